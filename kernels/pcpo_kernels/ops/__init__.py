"""One folder per op: the public function, its reference, its Triton kernels and their variants."""
