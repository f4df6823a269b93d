"""Run Triton's PTX for sm_80 on a CPU, with every memory access checked."""
