// Matrix products of a well-kept library whose bits do not depend on the number of threads.
#pragma once
#include <ATen/ATen.h>

namespace convbn {

// a b, for (M, K) and (K, N) or, sample by sample, (S, M, K) and (S, K, N), cut into blocks by the shape alone, each
// computed by one thread. On other devices torch's product as it is.
at::Tensor block_product(const at::Tensor& a, const at::Tensor& b);

}  // namespace convbn
