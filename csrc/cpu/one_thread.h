// Within a parallel region: what a library computes while one of these lives it plans for one thread, this one, so that
// it has the same bits wherever it is computed. (oneDNN asks OpenMP how many threads it may expect. If it expects more
// than a region within a region gives it, it computes other sums or waits for ever.)
#pragma once
#include <ATen/Parallel.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace convbn {

class OneThread {
#if defined(_OPENMP)
 public:
  OneThread() : before_(at::get_num_threads()) {
    omp_set_num_threads(1);
  }  // torch's own setting, made when first asked
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  int before_;
#else
 public:
  OneThread() {}
#endif
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;
};

}  // namespace convbn
