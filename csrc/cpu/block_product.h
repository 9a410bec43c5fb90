// Matrix products of a well-kept library whose bits do not depend on the number of threads.
#pragma once
#include <ATen/ATen.h>

namespace convbn {

// a b, for (M, K) and (K, N) or, sample by sample, (S, M, K) and (S, K, N). float32 and float64 products are cut into
// blocks by the shape alone, each computed by one thread; torch's products of 16-bit types and on other devices
// are taken as they are.
at::Tensor block_product(const at::Tensor& a, const at::Tensor& b);

}  // namespace convbn
