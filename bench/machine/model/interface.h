// What simulate.py and the model have in common, in the order of ctypes and numpy structs there.
#pragma once

#include <cstdint>

// In the order of bench.machine.pipes.PIPES.
enum Pipe { kFma, kHeavy, kAlu, kHalf, kXu, kLsu, kBranch, kUniform, kTensor, kFp64, kOther };
constexpr int kPipes = 11;

// In the order of bench.machine.simulate.KINDS.
enum Kind { kPlain, kLoad, kStore, kShared, kConstant, kCopy, kCommit, kAwait, kBarrier };

// What a scheduler does in a cycle, in the order of Simulated.waiting.
enum Why { kIssued, kScoreboard, kStall, kPipeBusy, kAtBarrier, kEmpty };
constexpr int kWhys = 6;

struct Instruction {
  int32_t pipe, kind, stall, yields, written, read, waits, groups;
};

// An executed instruction: 32-byte sectors, and bytes or passes through shared memory.
struct Item {
  int32_t place, sectors, amount;
  int64_t address;
};

struct Config {
  double cycles[kPipes];        // of a pipe, one warp's instruction
  double dram_bytes, l2_bytes;  // a cycle
  double l1, l2, dram, shared;  // latencies
  double taken;                 // cycles that a taken branch adds
  int32_t halves;
  int32_t warps;     // of a block
  int32_t resident;  // blocks at a time
  int32_t distinct;  // blocks whose items are given, which take turns
  int64_t blocks;    // that run in all
  int64_t streams;   // pairs of addresses: from and to DRAM
};

struct Result {
  int64_t cycles, issued, dram_bytes, l2_bytes;
  double in_flight;       // bytes of loads from DRAM, mean over cycles
  double waiting[kWhys];  // shares of scheduler cycles
};
