// The engine of -DSIMT_OS_THREADS: an operating system's thread per CUDA thread, for
// ThreadSanitizer. Kernels meet no lock but those of their own block's and warp's barriers, so that
// nothing orders two accesses that CUDA would not order.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "state.h"

namespace simt {

// Seconds that a thread waits at a barrier before it is taken for a deadlock.
inline double watchdog_seconds() {
  const char* text = std::getenv("SIMT_WATCHDOG_SECONDS");
  return text != nullptr ? std::atof(text) : 60;
}

// Threads that are kept from launch to launch: under ThreadSanitizer making one takes a
// millisecond. They meet at the beginning and the end of a launch, which order kernels in CUDA as
// well.
class Workers {
public:
  // Runs job(i) for all i below `count`, each on a thread of its own.
  template <class Job>
  static void run(unsigned count, Job&& job) {
    // Never destroyed, for its threads are not.
    static Workers& all = *new Workers;
    std::vector<Worker*> workers = all.take(count);
    std::mutex mutex;
    std::condition_variable finished;
    unsigned left = count;
    for (unsigned i = 0; i < count; ++i) {
      const std::lock_guard<std::mutex> lock(workers[i]->mutex);
      workers[i]->job = [&, i] {
        job(i);
        const std::lock_guard<std::mutex> done(mutex);
        if (--left == 0)
          finished.notify_one();
      };
      workers[i]->called.notify_one();
    }
    {
      std::unique_lock<std::mutex> lock(mutex);
      finished.wait(lock, [&] { return left == 0; });
    }
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.idle.insert(all.idle.end(), workers.begin(), workers.end());
  }

private:
  struct Worker {
    std::mutex mutex;
    std::condition_variable called;
    std::function<void()> job;
  };

  std::vector<Worker*> take(unsigned count) {
    std::vector<Worker*> taken;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      const std::size_t kept = idle.size() - std::min<std::size_t>(idle.size(), count);
      taken.assign(idle.begin() + static_cast<std::ptrdiff_t>(kept), idle.end());
      idle.resize(kept);
    }
    while (taken.size() < count) {
      taken.push_back(new Worker);
      std::thread(&Workers::work, taken.back()).detach();
    }
    return taken;
  }

  [[noreturn]] static void work(Worker* worker) noexcept {
    for (;;) {
      std::function<void()> job;
      {
        std::unique_lock<std::mutex> lock(worker->mutex);
        worker->called.wait(lock, [&] { return worker->job != nullptr; });
        std::swap(job, worker->job);
      }
      job();
    }
  }

  std::mutex mutex;
  std::vector<Worker*> idle;
};

// A block, and the threads that run it and some of the launch's other blocks after it.
class Engine : Block {
public:
  static void run(const Launch& launch) {
    Random random{launch.seed};
    const BlockOrder order(launch, random);
    const std::uint64_t crews =
        std::min<std::uint64_t>(std::max(launch.concurrent_blocks, 1), launch.blocks());
    std::vector<std::unique_ptr<Engine>> engines;
    for (std::uint64_t i = 0; i < crews; ++i)
      engines.emplace_back(new Engine(launch, order, i, crews, random));
    Workers::run(static_cast<unsigned>(crews) * launch.block.x, [&](unsigned i) {
      engines[i / launch.block.x]->live(i % launch.block.x);
    });
  }

  static void wait_block(Thread& self) {
    Engine& engine = of(self);
    engine.dawdle(self);
    self.wait("__syncthreads", 0);
    {
      WarpGate& gate = engine.gate(self);
      const std::lock_guard<std::mutex> lock(gate.mutex);
      if (gate.arrived > 0)
        fail_divergent(*self.warp);
      ++gate.at_barrier;
    }
    std::unique_lock<std::mutex> lock(engine.barrier.mutex);
    if (engine.exited > 0)
      fail_barrier(engine);
    engine.pass(engine.barrier, lock, engine.count(), self, [&] {
      for (unsigned i = 0; i < engine.count() / kLanes; ++i)
        engine.gates[i].at_barrier = 0;
      for (unsigned i = 0; i < engine.count(); ++i)
        engine.threads[i].run();
    });
  }

  static void wait_warp(Thread& self, const char* name, int width) {
    Engine& engine = of(self);
    engine.dawdle(self);
    self.wait(name, width);
    WarpGate& gate = engine.gate(self);
    std::unique_lock<std::mutex> lock(gate.mutex);
    if (gate.exited > 0 || gate.at_barrier > 0)
      fail_divergent(*self.warp);
    engine.pass(gate, lock, kLanes, self, [&] {
      check_agreement(*self.warp);
      for (unsigned i = 0; i < kLanes; ++i)
        self.warp->lanes[i].run();
    });
  }

  // Pieces of one allocation, made before the block's threads start: a thread that allocated for
  // the others would be ordered before them.
  static void* shared_piece(
      Thread& self, unsigned /*number*/, std::size_t offset, std::size_t /*bytes*/, bool /*first*/
  ) {
    return of(self).shared.get() + offset;
  }

  // Where a piece that the thread has taken begins.
  static void* piece(Thread& self, unsigned /*number*/, std::size_t offset) {
    return of(self).shared.get() + offset;
  }

private:
  struct Gate {
    std::mutex mutex;
    unsigned arrived = 0;
    std::atomic<std::uint32_t> passed{0};  // a futex: those it wakes take no lock
  };

  struct WarpGate : Gate {
    unsigned at_barrier = 0, exited = 0;
  };

  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };

  Engine(
      const Launch& what,
      const BlockOrder& blocks,
      std::uint64_t crew,
      std::uint64_t crews,
      Random& random
  )
      : order(blocks), crew(crew), crews(crews) {
    launch = &what;
    for (unsigned i = 0; i < count(); ++i)
      randoms.push_back(Random{random.next()});
    void* memory = nullptr;
    if (posix_memalign(&memory, kPieceAlign, what.shared_bytes) != 0)
      throw std::bad_alloc();
    shared.reset(static_cast<unsigned char*>(memory));
    begin(crew);
  }

  static Engine& of(Thread& thread) { return static_cast<Engine&>(*thread.block); }

  WarpGate& gate(const Thread& thread) { return gates[thread.index.x / kLanes]; }

  void begin(std::uint64_t i) {
    restart(order[i]);
    poison(shared.get(), launch->shared_bytes);
    exited = 0;
    for (WarpGate& gate : gates)
      gate.exited = 0;
  }

  void live(unsigned number) noexcept {
    Thread& self = threads[number];
    for (std::uint64_t i = crew; i < launch->blocks(); i += crews) {
      dawdle(self);
      current = &self;
      launch->call(launch->kernel);
      check_copies_landed(self);
      current = nullptr;
      leave(self);
      std::unique_lock<std::mutex> lock(end.mutex);
      pass(end, lock, count(), self, [&] {
        if (i + crews < launch->blocks())
          begin(i + crews);
      });
    }
  }

  void leave(Thread& self) {
    self.exit();
    {
      WarpGate& gate = this->gate(self);
      const std::lock_guard<std::mutex> lock(gate.mutex);
      if (gate.arrived > 0)
        fail_divergent(*self.warp);
      ++gate.exited;
    }
    const std::lock_guard<std::mutex> lock(barrier.mutex);
    if (barrier.arrived > 0)
      fail_barrier(*this);
    ++exited;
  }

  // Waits until `expected` threads are here; the last one calls `last` before any goes on.
  template <class Last>
  void pass(
      Gate& gate, std::unique_lock<std::mutex>& lock, unsigned expected, Thread& self, Last&& last
  ) {
    if (++gate.arrived == expected) {
      last();
      gate.arrived = 0;
      lock.unlock();
      gate.passed.fetch_add(1, std::memory_order_release);
      syscall(SYS_futex, &gate.passed, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
      return;
    }
    const std::uint32_t mine = gate.passed.load(std::memory_order_relaxed);
    lock.unlock();
    using Clock = std::chrono::steady_clock;
    const Clock::time_point begun = Clock::now();
    while (gate.passed.load(std::memory_order_acquire) == mine) {
      const timespec half_second{0, 500000000};
      syscall(SYS_futex, &gate.passed, FUTEX_WAIT_PRIVATE, mine, &half_second, nullptr, 0);
      if (gate.passed.load(std::memory_order_relaxed) == mine && Clock::now() - begun > patience)
        fail(
            self,
            "watchdog: " + doing(self) + " for more than " +
                std::to_string(static_cast<int>(patience.count())) + " s: " + doing(*this)
        );
    }
  }

  // Varies the schedule.
  void dawdle(const Thread& self) {
    Random& random = randoms[self.index.x];
    if (random.below(64) == 0)
      std::this_thread::sleep_for(std::chrono::microseconds(random.below(50)));
    else if (random.below(4) == 0)
      std::this_thread::yield();
  }

  const BlockOrder order;
  const std::uint64_t crew, crews;  // it runs blocks crew, crew + crews, ... of that order
  const std::chrono::duration<double> patience{watchdog_seconds()};
  std::vector<Random> randoms;
  std::unique_ptr<unsigned char, Free> shared;
  Gate barrier, end;
  unsigned exited = 0;  // guarded by the barrier's mutex
  WarpGate gates[kMaxThreads / kLanes];
};

}  // namespace simt
