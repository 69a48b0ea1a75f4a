"""What a run needs before it starts: memory per GPU, floating-point operations, and which settings fit."""
