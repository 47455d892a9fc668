// One multiprocessor, cycle by cycle: four schedulers with their pipes, the compiler's stall counts
// and scoreboards, blocks and their barriers; memory.h has the rest.
//
// simulate.py compiles this file and fills its structs; docs/machine.md has the model's rules.

#include <algorithm>
#include <cstdint>
#include <deque>
#include <queue>
#include <utility>
#include <vector>

#include "interface.h"
#include "memory.h"
#include "pipes.h"

namespace {

constexpr int kSchedulers = 4;
constexpr int kBoards = 6;
constexpr int64_t kTooLong = 200000000;

// Cycles between issue and use that no data sheet has.
constexpr double kArithmetic = 22;    // of results that scoreboards guard
constexpr double kOperandsRead = 12;  // of operands of such
constexpr double kConstantRead = 30;  // of special registers and indexed constants
constexpr double kBlockBarrier = 16;  // from the last warp's arrival
constexpr double kBlockStart = 20;

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
  Pipes pipes;
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
      : c_(config), code_(code), memory_(config, streams), warps_(c_.warps * c_.resident) {
    for (int i = 0; i < c_.distinct * c_.warps; ++i) {
      traces_.push_back({items, lengths[i]});
      items += lengths[i];
    }
    alive_.assign(c_.resident, 0);
    arrived_.assign(c_.resident, 0);
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
    result = {
        now_,
        whys_[kIssued],
        memory_.dram_bytes,
        memory_.l2_bytes,
        double(flying_cycles_) / now_,
        {}
    };
    for (int i = 0; i < kWhys; ++i)
      result.waiting[i] = double(whys_[i]) / (double(kSchedulers) * now_);
    return true;
  }

private:
  void start(int block) {
    if (started_ == c_.blocks)
      return;
    const int trace = int(started_++ % c_.distinct) * c_.warps;
    memory_.start(block);
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

  double free_at(const Scheduler& scheduler, int pipe) const {
    const double free = scheduler.pipes.free_at(c_, pipe);
    return pipe == kLsu ? std::max(free, memory_.free()) : free;
  }

  void issue(Scheduler& scheduler, Warp& warp) {
    const Item& item = warp.items[warp.at];
    const Instruction& one = code_[item.place];
    scheduler.greedy = one.yields ? nullptr : &warp;
    scheduler.pipes.occupy(c_, one.pipe, now_);
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
    Memory::Access access{done, read, 0};
    switch (one.kind) {
    case kLoad:
    case kStore:
    case kCopy:
      access = memory_.global(item, one.kind, warp.block, now_);
      if (one.kind == kCopy)
        warp.copied = std::max(warp.copied, access.done + 10);
      if (access.flying > 0) {
        flying_ += access.flying;
        events_.push({access.done, nullptr, 0, access.flying});
      }
      break;
    case kShared:
      access = memory_.shared(item, now_);
      break;
    case kConstant:
      access.done = now_ + kConstantRead;
      break;
    case kCommit:
      warp.groups.push_back(warp.copied);
      access.done = std::max(warp.copied, now_ + 4.0);
      break;
    default:
      break;
    }
    done = access.done;
    read = access.read;
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
  Memory memory_;
  std::vector<Warp> warps_;
  std::vector<std::pair<const Item*, int64_t>> traces_;
  std::vector<int> alive_, arrived_;
  Scheduler schedulers_[kSchedulers];
  std::priority_queue<Event> events_;
  int64_t now_ = 0, started_ = 0, finished_ = 0;
  int64_t flying_ = 0, flying_cycles_ = 0, whys_[kWhys] = {};
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
