// Work of a library cut into units, each computed, and planned, for one thread: the same bits wherever that is.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace convbn {

// oneDNN asks OpenMP how many threads it may expect. If it expects more than a region within a region gives it, it
// computes other sums or waits for ever.
class OneThread {
 public:
#if defined(_OPENMP)
  // A thread's first question makes torch set its number, which must not happen later.
  OneThread() : before_(at::get_num_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
#else
  OneThread() {}
#endif
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  [[maybe_unused]] int before_ = 1;
};

// f(0), …, f(units − 1), shared among threads. A single unit is in a parallel region too: the second one is empty.
template <class F>
void each_by_one_thread(int64_t units, const F& f) {
  at::parallel_for(0, std::max<int64_t>(2, units), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;  // threads of the region have a state of their own
    const OneThread one_thread;
    for (int64_t unit = begin; unit < std::min(end, units); ++unit) f(unit);
  });
}

}  // namespace convbn
