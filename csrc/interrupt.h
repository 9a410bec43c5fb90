// Ctrl-C in long loops that run without the GIL: a look at Python's signals now and then.
#pragma once
#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace convbn {

class InterruptCheck {
 public:
  // Looks for a signal if some time has passed since the last look. In the thread that made this object
  // KeyboardInterrupt (or what a signal handler raises) is thrown; threads that share its work learn from false that
  // they may leave it.
  bool operator()() {
    if (stopped_.load(std::memory_order_relaxed)) return false;
    if (std::this_thread::get_id() != owner_ || Clock::now() - looked_ < std::chrono::milliseconds(20)) return true;
    looked_ = Clock::now();
    const pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() == 0) return true;
    stopped_ = true;
    throw pybind11::error_already_set();
  }

 private:
  using Clock = std::chrono::steady_clock;
  const std::thread::id owner_ = std::this_thread::get_id();
  Clock::time_point looked_ = Clock::now();
  std::atomic<bool> stopped_ = false;
};

}  // namespace convbn
