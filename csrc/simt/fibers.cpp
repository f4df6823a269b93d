// Threads as fibers of the calling thread: who runs next, and where they meet.
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <deque>
#include <set>

#include "simt/engine.h"
#include "simt/launch.h"

namespace simt {

Engine engine;

namespace {

constexpr size_t kStack = 1 << 17, kMostFibers = 1 << 14;
constexpr unsigned kWarp = 32;

char* stacks = nullptr;
std::vector<Fiber> pool;
std::vector<std::unique_ptr<Block>> blocks;  // under way, by place
std::deque<Fiber*> ready;
jmp_buf scheduler;
Launch launch;
unsigned in_grid_barrier = 0, alive = 0;
uint64_t random_state = 1;
std::map<std::string, long> reports;
long launches = 0;

void to_scheduler() {
  if (!_setjmp(engine.running->resume)) _longjmp(scheduler, 1);
}

void wake(Fiber& f) {
  f.state = State::kReady;
  ready.push_back(&f);
}

void park(State state, At at) {
  engine.running->state = state;
  engine.running->at = at;
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.at.line() == b.at.line() && a.what == b.what &&
         (a.at.file_name() == b.at.file_name() || !strcmp(a.at.file_name(), b.at.file_name()));
}

// lets the lanes of `leader`'s collective go on once all that it names have come
void settle_warp(Block& b, const Fiber& leader) {
  const unsigned first = leader.thread / kWarp * kWarp, n = std::min<unsigned>(kWarp, b.fibers.size() - first);
  Fiber** lanes = b.fibers.data() + first;
  const unsigned present = n == kWarp ? ~0u : (1u << n) - 1, mask = leader.mask & present;
  unsigned here = 0;
  for (unsigned left = mask; left; left &= left - 1) {
    const unsigned k = static_cast<unsigned>(std::countr_zero(left));
    const Fiber& f = *lanes[k];
    if (f.state == State::kInWarp && f.mask == leader.mask) {
      here |= 1u << k;
    } else if (f.state != State::kDone) {
      return;
    }
  }
  if (here != mask) report("a collective of the warp names lanes that have left, at " + text_of(leader.at));
  uint64_t votes = 0, brought[kWarp];
  for (unsigned k = 0; k < n; ++k) {
    brought[k] = lanes[k]->value;
    if (here >> k & 1) votes |= static_cast<uint64_t>(brought[k] != 0) << k;
  }
  for (unsigned k = 0; k < n; ++k) {
    if (!(here >> k & 1)) continue;
    Fiber& f = *lanes[k];
    if (!same_place(f, leader))
      report("lanes of a warp meet in different collectives, at " + text_of(leader.at) + " and " + text_of(f.at));
    if (f.what == Exchange::kShuffle) {
      if (!(here >> f.from & 1)) report("a shuffle reads a lane that takes no part, at " + text_of(f.at));
      f.value = brought[f.from];
    }
    if (f.what == Exchange::kBallot) f.value = votes;
    if (f.what == Exchange::kSync) {
      ++f.warp_barriers;
      if (mask != present) report("__syncwarp of a part of a warp, whose order is not followed");
    }
    wake(f);
  }
}

// a lane has left: those that waited for it alone go on
void settle_warp_without(Block& b, const Fiber& gone) {
  const unsigned first = gone.thread / kWarp * kWarp;
  for (unsigned k = first; k < first + kWarp && k < b.fibers.size(); ++k)
    if (b.fibers[k]->state == State::kInWarp) return settle_warp(b, *b.fibers[k]);
}

void settle_block(Block& b) {
  if (b.waiting == 0 || b.waiting != b.alive) return;
  const Fiber* first = nullptr;
  const int count = b.count;
  b.waiting = 0, b.count = 0;
  for (Fiber* f : b.fibers) join(b.known, f->acquired);
  for (Fiber* f : b.fibers) {
    if (f->state != State::kInBlock) continue;
    if (!first) first = f;
    if (!same_place(*f, *first))
      report("threads of a block meet in different barriers, at " + text_of(first->at) + " and " + text_of(f->at));
    f->value = static_cast<uint64_t>(count);
    ++f->barriers, ++f->warp_barriers;
    f->acquired.clear();
    wake(*f);
  }
}

void settle_grid() {
  if (in_grid_barrier == 0 || in_grid_barrier != alive) return;
  in_grid_barrier = 0;
  for (const auto& b : blocks)
    for (Fiber* f : b->fibers)
      if (f->state == State::kInGrid) ++f->grid_barriers, ++f->barriers, ++f->warp_barriers, wake(*f);
}

// the loop of every fiber: it runs one thread of a launch after another
void live() {
  for (;;) {
    launch.body(launch.bound);
    Fiber& me = *engine.running;
    Block& b = *me.block;
    me.state = State::kDone;
    --b.alive, --alive;
    settle_warp_without(b, me);
    settle_block(b);
    if (launch.together) settle_grid();
    to_scheduler();
  }
}

void begin_block(uint32_t number, uint32_t place) {
  auto block = std::make_unique<Block>();
  const dim3& grid = launch.grid;
  block->number = number, block->place = place;
  block->index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  block->alive = launch.threads;
  alive += launch.threads;
  for (unsigned t = 0; t < launch.threads; ++t) {
    Fiber& f = pool[place * launch.threads + t];
    f.block = block.get(), f.thread = t;
    f.barriers = f.warp_barriers = f.grid_barriers = 0;
    f.seen.clear(), f.acquired.clear(), f.released.clear();
    block->fibers.push_back(&f);
    wake(f);
  }
  clear_shared(*block);
  if (blocks.size() <= place) blocks.resize(place + 1);
  blocks[place] = std::move(block);
}

void resume(Fiber& f) {
  engine.running = &f;
  if (!_setjmp(scheduler)) {
    if (f.begun) _longjmp(f.resume, 1);
    f.begun = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks + (&f - pool.data()) * kStack;
    f.start.uc_stack.ss_size = kStack;
    makecontext(&f.start, live, 0);
    setcontext(&f.start);
  }
  engine.running = nullptr;
}

Fiber& next() {
  if (engine.settings.order == 2) std::swap(ready.back(), ready[random_bits() % ready.size()]);
  const bool first = engine.settings.order == 0;
  Fiber& f = *(first ? ready.front() : ready.back());
  first ? ready.pop_front() : ready.pop_back();
  return f;
}

// the reasons why no remaining thread can continue
std::string stuck() {
  std::set<std::string> places;
  for (const auto& b : blocks)
    for (const Fiber* f : b->fibers)
      if (f->state != State::kDone) places.insert(text_of(f->at));
  std::string text = "deadlock, threads wait at";
  for (const std::string& place : places) text += " " + place;
  return text;
}

const char* refused() {
  const dim3& g = launch.grid;
  if (g.x == 0 || g.y == 0 || g.z == 0 || launch.threads == 0) return "an empty launch";
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535 || launch.threads > 1024) return "too large a launch";
  if (launch.shared > 48 << 10) return "too much dynamic shared memory";
  const uint64_t count = uint64_t(g.x) * g.y * g.z;
  if (launch.together && (count > 2 * static_cast<uint64_t>(processors()) || count * launch.threads > kMostFibers))
    return "too many blocks for a cooperative launch";
  return nullptr;
}

}  // namespace

uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void report(const std::string& what) { ++reports[std::string(launch.what ? launch.what : "") + ": " + what]; }

std::string text_of(At at) {
  const std::string path = at.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(at.line());
}

void give_way() {
  wake(*engine.running);
  to_scheduler();
}

bool on_a_stack(const void* p) {
  const char* at = static_cast<const char*>(p);
  return at >= stacks && at < stacks + kMostFibers * kStack;
}

uint3 thread_index() { return {engine.running->thread, 0, 0}; }
uint3 block_index() { return engine.running->block->index; }
uint3 block_size() { return {launch.threads, 1, 1}; }
uint3 grid_size() { return {launch.grid.x, launch.grid.y, launch.grid.z}; }

uint64_t meet_warp(Exchange what, unsigned mask, uint64_t value, unsigned from, At at) {
  Fiber& me = *engine.running;
  if (!(mask >> me.thread % kWarp & 1)) report("a lane calls a collective that leaves it out, at " + text_of(at));
  me.what = what, me.mask = mask, me.value = value, me.from = from;
  park(State::kInWarp, at);
  settle_warp(*me.block, me);
  to_scheduler();
  return me.value;
}

int meet_block(int predicate, At at) {
  Fiber& me = *engine.running;
  me.what = Exchange::kSync;
  park(State::kInBlock, at);
  me.block->count += predicate;
  ++me.block->waiting;
  settle_block(*me.block);
  to_scheduler();
  return static_cast<int>(me.value);
}

void meet_grid(At at) {
  if (!launch.together) report("a grid barrier in an ordinary launch, at " + text_of(at));
  park(State::kInGrid, at);
  ++in_grid_barrier;
  settle_grid();
  to_scheduler();
}

int processors() { return engine.settings.processors; }

const char* run(const Launch& given) {
  launch = given;
  if (const char* why = refused()) return why;
  if (!stacks) {
    void* room =
        mmap(nullptr, kMostFibers * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return "no memory for the fibers' stacks";
    stacks = static_cast<char*>(room);
    pool.resize(kMostFibers);
  }
  ++launches, ++engine.launch;
  const uint32_t count = launch.grid.x * launch.grid.y * launch.grid.z;
  engine.threads = launch.threads, engine.blocks = count, engine.shared_bytes = launch.shared;
  in_grid_barrier = alive = 0;
  ready.clear(), blocks.clear();
  begin_launch(launch.bound, launch.bound_bytes);

  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; ++i) order[i] = engine.settings.order == 1 ? count - 1 - i : i;
  if (engine.settings.order == 2)
    for (uint32_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  const size_t room = kMostFibers / launch.threads, wanted = launch.together ? count : engine.settings.side_by_side;
  const uint32_t together = static_cast<uint32_t>(std::min<size_t>({count, room, wanted}));
  uint32_t begun = 0;
  for (; begun < together; ++begun) begin_block(order[begun], begun);
  const char* failed = nullptr;
  for (uint32_t left = count; left > 0;) {
    if (ready.empty()) {
      report(stuck());
      failed = "deadlock";
      // their stacks hold the middle of a kernel
      for (Fiber& f : pool) f.begun = false;
      break;
    }
    Fiber& f = next();
    resume(f);
    if (f.state != State::kDone || f.block->alive > 0) continue;
    --left;
    if (begun < count) begin_block(order[begun++], f.block->place);
  }
  if (!failed) failed = too_much_shared();
  blocks.clear();
  end_launch(launch.bound);
  return failed;
}

}  // namespace simt

#define SIMT_API extern "C" __attribute__((visibility("default")))

SIMT_API void simt_configure(uint64_t seed, int order, int preempt, int side_by_side, int processors, int poison) {
  simt::engine.settings = {seed, order, preempt, side_by_side, processors, poison};
  simt::random_state = seed * 0x9E3779B97F4A7C15ull | 1;
}

// the findings since the last call, one per line
SIMT_API const char* simt_reports() {
  static std::string text;
  text.clear();
  for (const auto& [what, times] : simt::reports) text += std::to_string(times) + " x " + what + "\n";
  simt::reports.clear();
  return text.c_str();
}

SIMT_API long simt_launches() { return simt::launches; }
