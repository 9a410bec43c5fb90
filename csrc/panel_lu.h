// LAPACK's factorisations of large matrices panel by panel, so that ctrl-C is seen between two panels.
#pragma once
#include <ATen/core/Tensor.h>

#include "interrupt.h"

namespace convbn {

// LU with row exchanges of A (n, n) in place. Returns LAPACK's pivots (n,).
at::Tensor lu_by_panels(const at::Tensor& A, InterruptCheck& interrupt);

// A (n, n) ← A⁻¹; Inf or NaN where a pivot is zero. What it leaves when another thread's interrupt stops it is of no
// use.
void invert_by_panels(const at::Tensor& A, InterruptCheck& interrupt);

}  // namespace convbn
