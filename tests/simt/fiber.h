// A fiber: a stack of its own, entered and left by hand (boost.context), known to the address sanitizer when that is
// on.
#pragma once
#include <boost/context/detail/fcontext.hpp>
#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

class Fiber {
 public:
  static constexpr std::size_t kStackBytes = 128 << 10;  // the sanitizers' frames are large
  static constexpr std::size_t kGuardBytes = 4096;       // lowest page: unreadable, so that an overflow faults

  // Prepare to run entry() from the beginning, on the stack [stack, stack + kStackBytes).
  void prepare(char* stack, void (*entry)()) {
    low_ = stack + kGuardBytes;
    entry_ = entry;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(low_, kStackBytes - kGuardBytes);  // frames of a lane that never returned
#endif
    context_ =
        boost::context::detail::make_fcontext(stack + kStackBytes, kStackBytes - kGuardBytes, &Fiber::trampoline);
  }

  // Scheduler → fiber. Returns when the fiber suspends or finishes.
  void resume() {
    running_ = this;
    [[maybe_unused]] void* fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack, low_, kStackBytes - kGuardBytes);
#endif
    context_ = boost::context::detail::jump_fcontext(context_, nullptr).fctx;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    running_ = nullptr;
  }

  // Fiber → scheduler, to be resumed later.
  static void suspend() { leave(false); }

  // Fiber → scheduler, for ever. Destructors of the fiber's frames do not run: kernels own nothing.
  [[noreturn]] static void finish() {
    leave(true);
    __builtin_unreachable();
  }

  bool on_stack(const void* address) const { return address >= low_ && address < low_ + kStackBytes - kGuardBytes; }

 private:
  static void trampoline(boost::context::detail::transfer_t from) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_low_, &scheduler_bytes_);
#endif
    scheduler_ = from.fctx;
    running_->entry_();
    finish();
  }

  static void leave(bool for_ever) {
    [[maybe_unused]] void* fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack, scheduler_low_, scheduler_bytes_);
#else
    (void)for_ever;
#endif
    const auto back = boost::context::detail::jump_fcontext(scheduler_, nullptr);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_low_, &scheduler_bytes_);
#endif
    scheduler_ = back.fctx;
  }

  boost::context::detail::fcontext_t context_ = nullptr;
  char* low_ = nullptr;
  void (*entry_)() = nullptr;

  inline static Fiber* running_ = nullptr;
  inline static boost::context::detail::fcontext_t scheduler_ = nullptr;
  inline static const void* scheduler_low_ = nullptr;
  inline static std::size_t scheduler_bytes_ = 0;
};

}  // namespace simt
