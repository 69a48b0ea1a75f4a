"""One folder an operation: the public function, its plain reference, its Triton kernels and its compiled variants."""
