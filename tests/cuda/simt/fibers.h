// The default engine: a block's threads are fibers of the calling thread, switched at barriers.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "context.h"
#include "state.h"

#if defined(__SANITIZE_THREAD__)
#error "simt: -fsanitize=thread needs -DSIMT_OS_THREADS"
#endif

namespace simt {

class Engine : Block {
public:
  static void run(const Launch& launch) {
    static thread_local Engine engine;
    engine.run_blocks(launch);
  }

  static void wait_block(Thread& self) {
    Engine& engine = of(self);
    ++engine.at_barrier;
    self.wait("__syncthreads", 0);
    engine.suspend(self);
  }

  static void wait_warp(Thread& self, const char* name, int width) {
    Engine& engine = of(self);
    ++engine.at_collective;
    self.wait(name, width);
    engine.suspend(self);
  }

  // A heap allocation for each piece, so that AddressSanitizer sees where it ends.
  static void* shared_piece(
      Thread& self, unsigned number, std::size_t /*offset*/, std::size_t bytes, bool first
  ) {
    Piece& piece = of(self).pieces[number];
    if (first) {
      if (piece.memory == nullptr || piece.bytes != bytes) {
        void* memory = nullptr;
        if (posix_memalign(&memory, kPieceAlign, bytes) != 0)
          throw std::bad_alloc();
        piece.memory.reset(memory);
        piece.bytes = bytes;
      }
      poison(piece.memory.get(), bytes);
    }
    return piece.memory.get();
  }

  // Where a piece that the thread has taken begins.
  static void* piece(Thread& self, unsigned number, std::size_t /*offset*/) {
    return of(self).pieces[number].memory.get();
  }

private:
  struct Fiber {
    Context context;
    char* stack = nullptr;
    void* asan_stack = nullptr;
  };

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  struct Piece {
    std::unique_ptr<void, Free> memory;
    std::size_t bytes = 0;
  };

  static Engine& of(Thread& thread) { return static_cast<Engine&>(*thread.block); }

  void run_blocks(const Launch& what) {
    launch = &what;
    random.state = what.seed;
    const BlockOrder order(what, random);
    for (std::uint64_t i = 0; i < what.blocks(); ++i)
      run_block(order[i]);
    for (Piece& piece : pieces)
      piece = Piece();
  }

  void run_block(dim3 at) {
    restart(at);
    exited = 0;
    for (;;) {
      at_barrier = 0;
      ready.clear();
      for (unsigned i = 0; i < count() / kLanes; ++i)
        ready.push_back(i);
      while (!ready.empty()) {
        const unsigned chosen = random.below(static_cast<unsigned>(ready.size()));
        if (!run_warp(warps[ready[chosen]])) {
          ready[chosen] = ready.back();
          ready.pop_back();
        }
      }
      if (exited == count())
        return;
      if (at_barrier < count())
        fail_barrier(*this);
      for (unsigned i = 0; i < count(); ++i)
        threads[i].run();
    }
  }

  // Runs a warp through some of its collectives; false when its lanes wait for the block or have
  // exited. Every lane can run whenever this begins, and after each collective.
  bool run_warp(Warp& warp) {
    const bool far = random.below(4) == 0;
    for (unsigned left = 1 + random.below(32); far || left > 0; --left) {
      const std::uint64_t bits = random.next();
      const unsigned first = bits >> 32 & (kLanes - 1);
      const unsigned stride = (bits >> 40 & (kLanes - 1)) | 1;
      at_collective = 0;
      for (unsigned i = 0; i < kLanes; ++i)
        resume(warp.lanes[(first + i * stride) % kLanes]);
      if (at_collective == 0)
        return false;
      if (at_collective < kLanes)
        fail_divergent(warp);
      check_agreement(warp);
      for (unsigned i = 0; i < kLanes; ++i)
        warp.lanes[i].run();
    }
    return true;
  }

  void resume(Thread& thread) {
    Fiber& fiber = fibers[thread.index.x];
    if (fiber.stack == nullptr) {
      fiber.stack = stacks.take();
      fiber.context.start(fiber.stack, enter);
    }
    current = &thread;
#if defined(SIMT_ASAN)
    void* asan_stack = nullptr;
    __sanitizer_start_switch_fiber(&asan_stack, fiber.stack, kStackBytes);
#endif
    scheduler.switch_to(fiber.context);
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(asan_stack, nullptr, nullptr);
#endif
    current = nullptr;
    if (thread.exited.load(std::memory_order_relaxed)) {
      stacks.give_back(fiber.stack);
      fiber.stack = nullptr;
    }
  }

  void suspend(Thread& thread) {
    Fiber& fiber = fibers[thread.index.x];
#if defined(SIMT_ASAN)
    const bool last = thread.exited.load(std::memory_order_relaxed);
    __sanitizer_start_switch_fiber(
        last ? nullptr : &fiber.asan_stack, scheduler_stack, scheduler_bytes
    );
#endif
    fiber.context.switch_to(scheduler);
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fiber.asan_stack, &scheduler_stack, &scheduler_bytes);
#endif
  }

  // A fiber's first function. noexcept: there is nothing below it to unwind to.
  static void enter() noexcept {
    Thread& thread = *current;
    Engine& engine = of(thread);
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &engine.scheduler_stack, &engine.scheduler_bytes);
#endif
    engine.launch->call(engine.launch->kernel);
    check_copies_landed(thread);
    thread.exit();
    ++engine.exited;
    engine.suspend(thread);
  }

  std::unique_ptr<Fiber[]> fibers{new Fiber[kMaxThreads]};
  Stacks stacks;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_bytes = 0;
  std::vector<unsigned> ready;  // warps that do not wait for the block
  unsigned exited = 0, at_barrier = 0, at_collective = 0;
  Piece pieces[kMaxPieces];
  Random random{0};
};

}  // namespace simt
