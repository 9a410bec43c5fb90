// For each_isa.inl.
#include "multiply.inl"

template <class T>
static void add_products(const T* const* A, const T* const* B, int64_t count, int64_t rs, int64_t cs, int64_t ldb,
                         int64_t K, T* C, int64_t ldc, int64_t M, int64_t N, bool add) {
  Product<T>::multiply({A, B, count, rs, cs, ldb, K}, C, ldc, M, N, add);
}
