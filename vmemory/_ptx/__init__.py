"""Runs compiled GPU code without a GPU: the PTX that Triton makes for sm_80, on a CPU, with every access checked."""
