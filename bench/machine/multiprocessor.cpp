// One multiprocessor, cycle by cycle: four schedulers with their pipes, the compiler's stall counts
// and scoreboards, one load/store unit, and a multiprocessor's share of L2 and DRAM.
//
// simulate.py compiles this file and fills its structs; docs/machine.md has the model's rules.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <queue>
#include <unordered_set>
#include <vector>

namespace {

constexpr int kSchedulers = 4;
constexpr int kBoards = 6;
constexpr int64_t kTooLong = 200000000;

// In the order of bench.machine.pipes.PIPES.
enum Pipe { kFma, kHeavy, kAlu, kHalf, kXu, kLsu, kBranch, kUniform, kTensor, kFp64, kOther };
constexpr int kPipes = 11;

// In the order of bench.machine.simulate.KINDS.
enum Kind { kPlain, kLoad, kStore, kShared, kConstant, kCopy, kCommit, kAwait, kBarrier };

// Cycles between issue and use, and rates, that no data sheet has.
constexpr double kArithmetic = 22;    // of results that scoreboards guard
constexpr double kOperandsRead = 12;  // of operands of such
constexpr double kConstantRead = 30;  // of special registers and indexed constants
constexpr double kQueue = 24;         // that the load/store unit may be behind
constexpr double kBlockBarrier = 16;  // from the last warp's arrival
constexpr double kBlockStart = 20;
constexpr double kFromL2 = 40;    // after the last byte has left L2
constexpr double kFromDram = 60;  // ... DRAM

}  // namespace

struct Instruction {
  int32_t pipe, kind, stall, yields, written, read, waits, groups;
};

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
  double in_flight;   // bytes of loads from DRAM, mean over cycles
  double waiting[6];  // shares of scheduler cycles: see Why
};

namespace {

enum Why { kIssued, kScoreboard, kStall, kPipeBusy, kAtBarrier, kEmpty };

struct Warp {
  const Item* items = nullptr;
  int64_t length = 0, at = 0;
  double ready = 0;
  int pending[kBoards] = {};
  bool at_barrier = false, done = true;
  int block = 0;
  double copied = 0;          // when its last copy lands
  std::deque<double> groups;  // of copies, when each lands
};

struct Event {
  double time;
  Warp* warp;
  int board;
  int64_t bytes;  // of loads that land; no board then
  bool operator<(const Event& other) const { return time > other.time; }
};

struct Scheduler {
  std::vector<Warp*> warps;
  Warp* greedy = nullptr;
  double free[kPipes] = {};
  double halves[2] = {};  // of FMA: the one that takes integer products, and the other
};

class Multiprocessor {
public:
  Multiprocessor(
      const Config& config,
      const Instruction* code,
      const Item* items,
      const int64_t* lengths,
      const int64_t* streams
  )
      : c_(config), code_(code), streams_(streams), warps_(c_.warps * c_.resident) {
    for (int i = 0; i < c_.distinct * c_.warps; ++i) {
      traces_.push_back({items, lengths[i]});
      items += lengths[i];
    }
    alive_.assign(c_.resident, 0);
    arrived_.assign(c_.resident, 0);
    lines_.resize(c_.resident);
    for (int w = 0; w < c_.warps * c_.resident; ++w)
      schedulers_[w % kSchedulers].warps.push_back(&warps_[w]);
  }

  bool run(Result& result) {
    for (int b = 0; b < c_.resident; ++b)
      start(b);
    for (; finished_ < c_.blocks; ++now_) {
      if (now_ > kTooLong)
        return false;
      while (!events_.empty() && events_.top().time <= now_)
        land();
      flying_cycles_ += flying_;
      for (Scheduler& scheduler : schedulers_)
        ++whys_[schedule(scheduler)];
    }
    result = {now_, whys_[kIssued], dram_moved_, l2_moved_, double(flying_cycles_) / now_, {}};
    for (int i = 0; i < 6; ++i)
      result.waiting[i] = double(whys_[i]) / (double(kSchedulers) * now_);
    return true;
  }

private:
  void start(int block) {
    if (started_ == c_.blocks)
      return;
    const int trace = int(started_++ % c_.distinct) * c_.warps;
    lines_[block].clear();
    for (int w = 0; w < c_.warps; ++w) {
      Warp& warp = warps_[block * c_.warps + w];
      warp = Warp();
      warp.items = traces_[trace + w].first;
      warp.length = traces_[trace + w].second;
      warp.done = false;
      warp.block = block;
      warp.ready = now_ + kBlockStart;
    }
    alive_[block] = c_.warps;
    arrived_[block] = 0;
  }

  void land() {
    const Event event = events_.top();
    events_.pop();
    flying_ -= event.bytes;
    if (event.warp != nullptr)
      --event.warp->pending[event.board];
  }

  // Greedy, then oldest: the last warp goes on until it has to wait.
  Why schedule(Scheduler& scheduler) {
    Why why = kEmpty;
    if (scheduler.greedy != nullptr && can_issue(scheduler, *scheduler.greedy, why)) {
      issue(scheduler, *scheduler.greedy);
      return kIssued;
    }
    for (Warp* warp : scheduler.warps) {
      if (can_issue(scheduler, *warp, why)) {
        issue(scheduler, *warp);
        return kIssued;
      }
    }
    return why;
  }

  bool can_issue(const Scheduler& scheduler, Warp& warp, Why& why) {
    if (warp.done)
      return false;
    Why own = kIssued;
    const Instruction& one = code_[warp.items[warp.at].place];
    if (warp.at_barrier) {
      own = kAtBarrier;
    } else if (warp.ready > now_) {
      own = kStall;
    } else {
      for (int board = 0; board < kBoards; ++board)
        if ((one.waits >> board & 1) && warp.pending[board] > 0)
          own = kScoreboard;
      if (one.kind == kAwait) {
        while (!warp.groups.empty() && warp.groups.front() <= now_)
          warp.groups.pop_front();
        if (int(warp.groups.size()) > one.groups)
          own = kScoreboard;
      }
      if (own == kIssued && free_at(scheduler, one.pipe) > now_)
        own = kPipeBusy;
    }
    why = std::min(why, own);
    return own == kIssued;
  }

  double free_at(const Scheduler& s, int pipe) const {
    if (pipe == kLsu)
      return std::max(s.free[kLsu], unit_free_ - kQueue);
    // Begins within the cycle in which the pipe gets free, so that its mean rate is kept.
    if (pipe == kTensor)
      return s.free[kTensor] - 0.999;
    if (c_.halves && pipe == kFma)
      return std::min(s.halves[0], s.halves[1]);
    if (c_.halves && pipe == kHeavy)
      return s.halves[0];
    if (c_.halves && pipe == kHalf)
      return std::max(s.halves[0], s.halves[1]);
    return s.free[pipe == kHeavy ? int(kFma) : pipe];
  }

  void occupy(Scheduler& s, int pipe) {
    if (c_.halves && (pipe == kFma || pipe == kHeavy)) {
      const int half = pipe == kFma && s.halves[1] <= now_ ? 1 : 0;
      s.halves[half] = now_ + 2;  // 32 lanes on 16
    } else if (c_.halves && pipe == kHalf) {
      s.halves[0] = s.halves[1] = now_ + c_.cycles[kHalf];
    } else if (pipe == kTensor) {
      s.free[pipe] = std::max(s.free[pipe], double(now_)) + c_.cycles[pipe];
    } else {
      s.free[pipe == kHeavy ? int(kFma) : pipe] = now_ + c_.cycles[pipe];
    }
  }

  void issue(Scheduler& scheduler, Warp& warp) {
    const Item& item = warp.items[warp.at];
    const Instruction& one = code_[item.place];
    scheduler.greedy = one.yields ? nullptr : &warp;
    occupy(scheduler, one.pipe);
    double done = now_ + kArithmetic, read = now_ + kOperandsRead;
    access(warp, item, one, done, read);
    hold(warp, one.written, done);
    hold(warp, one.read, read);
    double gap = std::max(one.stall, 1);
    if (one.kind == kBarrier)
      arrive(warp);
    const bool last = ++warp.at == warp.length;
    if (!last && one.pipe == kBranch && warp.items[warp.at].place != item.place + 1)
      gap += c_.taken;
    warp.ready = std::max(warp.ready, now_ + gap);
    if (last)
      finish(warp);
  }

  void hold(Warp& warp, int board, double until) {
    if (board >= kBoards)
      return;
    ++warp.pending[board];
    events_.push({until, &warp, board, 0});
  }

  void access(Warp& warp, const Item& item, const Instruction& one, double& done, double& read) {
    const double begin = std::max(unit_free_, double(now_));
    switch (one.kind) {
    case kLoad:
    case kStore:
    case kCopy: {
      // The unit takes 128 bytes a cycle.
      unit_free_ = begin + std::max(1.0, item.amount / 128.0);
      read = unit_free_ + 8;
      done = global(warp, item, one.kind, begin);
      if (one.kind == kCopy)
        warp.copied = std::max(warp.copied, done + 10);
      break;
    }
    case kShared:
      unit_free_ = begin + std::max(1, item.amount);
      done = unit_free_ + c_.shared - 6;
      read = unit_free_ + 4;
      break;
    case kConstant:
      done = now_ + kConstantRead;
      break;
    case kCommit:
      warp.groups.push_back(warp.copied);
      done = std::max(warp.copied, now_ + 4.0);
      break;
    default:
      break;
    }
  }

  // When an access of global memory is done. Streams go through DRAM; the rest is in L2, and in L1
  // where the block has read it before.
  double global(Warp& warp, const Item& item, int kind, double begin) {
    const double bytes = 32.0 * item.sectors;
    if (bytes == 0)
      return begin + c_.l1;
    if (streamed(item.address)) {
      dram_free_ = std::max(dram_free_, begin) + bytes / c_.dram_bytes;
      dram_moved_ += int64_t(bytes);
      const double done = std::max(begin + c_.dram, dram_free_ + kFromDram);
      if (kind != kStore) {
        flying_ += int64_t(bytes);
        events_.push({done, nullptr, 0, int64_t(bytes)});
      }
      return done;
    }
    if (kind == kLoad && !lines_[warp.block].insert(item.address >> 7).second)
      return begin + c_.l1;
    l2_free_ = std::max(l2_free_, begin) + bytes / c_.l2_bytes;
    l2_moved_ += int64_t(bytes);
    return std::max(begin + c_.l2, l2_free_ + kFromL2);
  }

  bool streamed(int64_t address) const {
    for (int64_t i = 0; i < c_.streams; ++i)
      if (address >= streams_[2 * i] && address < streams_[2 * i + 1])
        return true;
    return false;
  }

  void arrive(Warp& warp) {
    warp.at_barrier = true;
    ++arrived_[warp.block];
    release(warp.block);
  }

  void release(int block) {
    if (arrived_[block] == 0 || arrived_[block] < alive_[block])
      return;
    arrived_[block] = 0;
    for (int w = 0; w < c_.warps; ++w) {
      Warp& warp = warps_[block * c_.warps + w];
      if (warp.at_barrier) {
        warp.at_barrier = false;
        warp.ready = now_ + kBlockBarrier;
      }
    }
  }

  void finish(Warp& warp) {
    warp.done = true;
    const int block = warp.block;
    if (--alive_[block] > 0)
      return release(block);
    ++finished_;
    // Loads that nobody awaited land in the next block's warps otherwise.
    std::priority_queue<Event> kept;
    for (; !events_.empty(); events_.pop()) {
      Event event = events_.top();
      if (event.warp != nullptr && event.warp->block == block)
        continue;
      kept.push(event);
    }
    events_.swap(kept);
    start(block);
  }

  const Config& c_;
  const Instruction* code_;
  const int64_t* streams_;
  std::vector<Warp> warps_;
  std::vector<std::pair<const Item*, int64_t>> traces_;
  std::vector<int> alive_, arrived_;
  std::vector<std::unordered_set<int64_t>> lines_;
  Scheduler schedulers_[kSchedulers];
  std::priority_queue<Event> events_;
  double unit_free_ = 0, dram_free_ = 0, l2_free_ = 0;
  int64_t now_ = 0, started_ = 0, finished_ = 0, dram_moved_ = 0, l2_moved_ = 0;
  int64_t flying_ = 0, flying_cycles_ = 0, whys_[6] = {};
};

}  // namespace

extern "C" int simulate(
    const Config* config,
    const Instruction* code,
    const Item* items,
    const int64_t* lengths,
    const int64_t* streams,
    Result* result
) {
  return Multiprocessor(*config, code, items, lengths, streams).run(*result) ? 0 : 1;
}
