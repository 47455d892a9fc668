// A thread's stream of vectors through a ring in shared memory, several vectors ahead of its
// arithmetic. Registers do not hold such a distance: nvcc moves loads down to their use, and a move
// from `next` to `current` awaits them. Every thread copies for itself alone, so no barrier stands
// between a copy and its use.
#pragma once

#include "cuda/support/async_copy.cuh"
#include "cuda/support/lanes.cuh"

namespace dcconv::cuda {

// N streams of V elements, Slots deep. Vectors of less than 16 bytes are loaded when they are
// taken.
//
//   ring.ahead(...) Slots - 1 times, for the first vectors; then per vector, in the same order:
//   ring.take(...), arithmetic, ring.ahead(...) for the vector Slots - 1 further on.
//
// A copy lands in the slot whose vector was taken, and worked on, one turn before.
template <class T, int V, int N, int Slots>
class VectorRing {
public:
  static_assert(
      Slots >= 2 && (Slots & (Slots - 1)) == 0 && (N & (N - 1)) == 0, "a mask wraps the ring"
  );
  static constexpr bool kAsync = sizeof(Vector<T, V>) == 16;
  static constexpr int kAhead = Slots - 1;
  static constexpr int kBytes = kAsync ? N * Slots * kThreads * 16 : 0;

  __device__ __forceinline__ explicit VectorRing(SharedMemory& shared) {
    if constexpr (kAsync)
      own_ = shared.take<unsigned char>(kBytes) + threadIdx.x * 16;
  }

  // Begins anew: everything that was copied has been taken.
  __device__ __forceinline__ void restart() { at_ = to_ = 0; }

  // Starts the copies of a vector of each stream. Invalid ones keep the count.
  __device__ __forceinline__ void ahead(const T* const (&from)[N], bool valid) {
    if constexpr (kAsync) {
      if (valid) {
#pragma unroll
        for (int n = 0; n < N; ++n)
          copy_async(own_ + to_ + n * kStream, from[n]);
      }
      commit_async();
      to_ = (to_ + kTurn) & (Slots * kTurn - 1);
    }
  }

  // The next vector of each stream; `from` is where it came from, read where nothing was copied.
  __device__ __forceinline__ void take(const T* const (&from)[N], Vector<T, V> (&out)[N]) {
    if constexpr (kAsync) {
      wait_async<kAhead - 1>();
#pragma unroll
      for (int n = 0; n < N; ++n)
        out[n] = load_vector<T, V>(reinterpret_cast<const T*>(own_ + at_ + n * kStream));
      at_ = (at_ + kTurn) & (Slots * kTurn - 1);
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n)
        out[n] = load_vector<T, V>(from[n]);
    }
  }

private:
  static constexpr int kStream = kThreads * 16, kTurn = N * kStream;

  unsigned char* own_ = nullptr;
  int at_ = 0, to_ = 0;  // bytes
};

}  // namespace dcconv::cuda
