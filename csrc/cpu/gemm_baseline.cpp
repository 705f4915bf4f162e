#include "gemm_tables.h"

#define MOE_LEVEL 0
#define MOE_NAMESPACE baseline
#include "gemm_kernels.h"
