// Ctrl-C in long loops that run without the GIL: a look at Python's signals now and then.
#pragma once
#include <pybind11/pybind11.h>

#include <chrono>

namespace convbn {

class InterruptCheck {
 public:
  // Whether some time has passed since the last look.
  bool due() const { return Clock::now() - looked_ > std::chrono::milliseconds(20); }

  // Throws KeyboardInterrupt (or what a signal handler raises). The caller holds the GIL.
  void look() {
    looked_ = Clock::now();
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  }

  // Both, from a thread that may lack the GIL.
  void operator()() {
    if (!due()) return;
    const pybind11::gil_scoped_acquire gil;
    look();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point looked_ = Clock::now();
};

}  // namespace convbn
