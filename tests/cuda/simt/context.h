// Switching between stacks: assembly on x86-64, ucontext elsewhere and under -DSIMT_UCONTEXT.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_ASSEMBLY_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if defined(SIMT_ASAN)
constexpr std::size_t kStackBytes = 512 << 10;
#else
constexpr std::size_t kStackBytes = 128 << 10;
#endif

// Stacks that are handed out again, the last one first because it is in the cache. Each has a guard
// page below.
class Stacks {
public:
  Stacks() : page(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {}
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  ~Stacks() {
    for (void* mapping : mappings) {
#if defined(SIMT_ASAN)
      // A fiber's first frame never returns, and the marks round its variables stay behind. The
      // addresses may become another thread's.
      __asan_unpoison_memory_region(mapping, page + kStackBytes);
#endif
      munmap(mapping, page + kStackBytes);
    }
  }

  // The lowest address of kStackBytes.
  char* take() {
    if (unused.empty()) {
      void* mapping = mmap(
          nullptr,
          page + kStackBytes,
          PROT_READ | PROT_WRITE,
          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
          -1,
          0
      );
      if (mapping == MAP_FAILED || mprotect(mapping, page, PROT_NONE) != 0)
        throw std::bad_alloc();
      mappings.push_back(mapping);
      unused.push_back(static_cast<char*>(mapping) + page);
    }
    char* stack = unused.back();
    unused.pop_back();
    return stack;
  }

  void give_back(char* stack) { unused.push_back(stack); }

private:
  std::size_t page;
  std::vector<void*> mappings;
  std::vector<char*> unused;
};

#if defined(SIMT_ASSEMBLY_SWITCH)

// Saves the callee-saved registers on the running stack, its pointer in *from, and returns on `to`.
// noipa: the compiler would otherwise see which registers the function itself changes and keep
// values in the others.
#if defined(__clang__)
__attribute__((naked, noinline)) inline void switch_stack(void** from, void* to)
#else
__attribute__((naked, noinline, noipa)) inline void switch_stack(void** /*from*/, void* /*to*/)
#endif
{
  __asm__("pushq %rbp\n\t"
          "pushq %rbx\n\t"
          "pushq %r12\n\t"
          "pushq %r13\n\t"
          "pushq %r14\n\t"
          "pushq %r15\n\t"
          "movq %rsp, (%rdi)\n\t"
          "movq %rsi, %rsp\n\t"
          "popq %r15\n\t"
          "popq %r14\n\t"
          "popq %r13\n\t"
          "popq %r12\n\t"
          "popq %rbx\n\t"
          "popq %rbp\n\t"
          "ret\n\t");
}

struct Context {
  void* pointer = nullptr;

  void start(char* stack, void (*entry)()) {
    // Stacks that begin at one offset of their pages would share few cache lines.
    const std::uintptr_t number = reinterpret_cast<std::uintptr_t>(stack) / kStackBytes;
    void** top = reinterpret_cast<void**>(stack + kStackBytes - number * 5 % 64 * 64);
    // The entry finds the stack as after a call: a return address, here none, at 8 modulo 16.
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i)
      *--top = nullptr;
    pointer = top;
  }

  void switch_to(Context& next) { switch_stack(&pointer, next.pointer); }
};

#else

struct Context {
  ucontext_t state;

  void start(char* stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = kStackBytes;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }

  void switch_to(Context& next) { swapcontext(&state, &next.state); }
};

#endif

}  // namespace simt
