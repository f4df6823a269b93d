// Every access of device code: inside what it may touch, aligned, of a value that was written, and in an order with
// every other thread's. Kernels compiled with -fsanitize=thread call the functions at the end of this file, which stand
// in for that sanitizer's library; compiled without it they run unchecked.
#include "simt/memory.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <unordered_map>

#include "simt/engine.h"

namespace simt {
namespace {

constexpr size_t kShared = 48 << 10;  // what every device grants a block
constexpr size_t kSharedRoom = 1 << 17, kMostBlocks = 64;
constexpr size_t kGap = 64;  // between arrays of a block, so that one's end is not another's beginning

// the smallest part of memory that is followed by itself
struct Cell {
  Moment write, read[2];
  bool valid = true, atomic = false;
};

struct Range {
  const char *begin, *end;
  size_t size;  // of a cell
  const char* what;
  bool constant = false;
  std::vector<Cell> cells;

  Range(const void* p, size_t bytes, size_t cell, const char* name, bool valid)
      : begin(static_cast<const char*>(p)),
        end(begin + bytes),
        size(cell),
        what(name),
        cells((bytes + cell - 1) / cell) {
    if (!valid)
      for (Cell& c : cells) c.valid = false;
  }
  bool holds(const char* p) const { return p >= begin && p < end; }
};

std::map<const char*, Range> memory;  // by where they begin
std::vector<Range> arrays[kMostBlocks];
char* shared_room = nullptr;
size_t most_shared = 0;
std::unordered_map<const void*, Known> released;  // by an atomic's address
// the checks' own containers may be compiled with the kernels' flags
bool checking = false;

Range* recent = nullptr;  // where the last access lay

Range* find(const char* p) {
  if (recent && recent->holds(p)) return recent;
  auto it = memory.upper_bound(p);
  if (it == memory.begin()) return nullptr;
  Range& range = (--it)->second;
  return range.holds(p) ? recent = &range : nullptr;
}

void add(Range range) {
  recent = nullptr;
  const char* begin = range.begin;
  memory.insert_or_assign(begin, std::move(range));
}

std::string place_of(const void* pc) {
  Dl_info info{};
  dladdr(pc, &info);
  char text[32];
  snprintf(text, sizeof text, " @%zx@",
           static_cast<size_t>(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)));
  return text;
}

Moment now() {
  const Fiber& f = *engine.running;
  return {f.block->number * engine.threads + f.thread + 1, f.barriers, f.warp_barriers,
          static_cast<uint16_t>(f.grid_barriers), engine.launch};
}

// whether the running thread has met the one that was there since
bool ordered(const Moment& then) {
  const Fiber& me = *engine.running;
  if (then.thread == 0 || then.launch != engine.launch || then.grid_barriers < me.grid_barriers) return true;
  const uint32_t thread = (then.thread - 1) % engine.threads, block = (then.thread - 1) / engine.threads;
  if (block == me.block->number)
    return thread == me.thread || then.barriers < me.barriers ||
           (thread / 32 == me.thread / 32 && then.warp_barriers < me.warp_barriers);
  const auto past = [&](const Known& known) { return block < known.size() && known[block] > then.barriers; };
  return past(me.block->known) || past(me.acquired);
}

const char* from_where(const Moment& then) {
  return (then.thread - 1) / engine.threads == engine.running->block->number ? " of its block in "
                                                                             : " of another block in ";
}

void check_cell(Cell& c, const Range& range, bool write, bool atomic, const void* pc) {
  if (!write && !c.valid) {
    report(std::string("reads what nothing has written in ") + range.what + place_of(pc));
    c.valid = true;
  }
  if (!ordered(c.write) && !(atomic && c.atomic)) {
    report(std::string(write ? "race: writes after a write" : "race: reads after a write") + from_where(c.write) +
           range.what + place_of(pc));
    c.write = {};
  }
  const Moment me = now();
  if (!write) {
    // of two different readers at least one is not the next writer
    if (c.read[0].thread != me.thread) c.read[1] = c.read[0];
    c.read[0] = me;
    return;
  }
  for (const Moment& read : c.read)
    if (!ordered(read)) report(std::string("race: writes after a read") + from_where(read) + range.what + place_of(pc));
  c.read[0] = c.read[1] = {};
  c.write = me, c.valid = true, c.atomic = atomic;
}

Range* range_of(const char* p, size_t bytes, bool write, const void* pc) {
  const auto kind = [write] { return std::string(write ? "writes " : "reads "); };
  Range* range = nullptr;
  if (shared_room && p >= shared_room && p < shared_room + kMostBlocks * kSharedRoom) {
    for (Range& r : arrays[engine.running->block->place])
      if (r.holds(p)) range = &r;
    if (!range) return report(kind() + "outside of the block's shared arrays" + place_of(pc)), nullptr;
  } else if (!(range = find(p))) {
    // constants of the library
    Dl_info own{}, other{};
    dladdr(pc, &own);
    if (!write && dladdr(p, &other) && own.dli_fbase == other.dli_fbase) return nullptr;
    return report(kind() + "outside of every tensor" + place_of(pc)), nullptr;
  }
  if (p + bytes > range->end) return report(kind() + "past the end of " + range->what + place_of(pc)), nullptr;
  if (write && range->constant) return report(kind() + range->what + place_of(pc)), nullptr;
  return range;
}

void access(const void* address, size_t bytes, bool write, const void* pc) {
  if (!engine.running || checking || on_a_stack(address)) return;
  checking = true;
  check_access(address, bytes, write, false, pc);
  const bool yields = engine.settings.preempt && random_bits() % engine.settings.preempt == 0;
  checking = false;
  if (yields) give_way();
}

}  // namespace

void check_access(const void* address, size_t bytes, bool write, bool atomic, const void* pc) {
  const char* p = static_cast<const char*>(address);
  Range* range = range_of(p, bytes, write, pc);
  if (!range) return;
  if (std::has_single_bit(bytes) && bytes <= 16 && reinterpret_cast<uintptr_t>(p) % bytes)
    report("an access of " + std::to_string(bytes) + " bytes is not aligned in " + range->what + place_of(pc));
  const size_t first = (p - range->begin) / range->size, last = (p + bytes - 1 - range->begin) / range->size;
  for (size_t i = first; i <= last; ++i) check_cell(range->cells[i], *range, write, atomic, pc);
}

void begin_launch(const void* bound, size_t bytes) {
  most_shared = 0;
  released.clear();
  know_memory(bound, bytes, 8, "the launch's arguments");
  memory.at(static_cast<const char*>(bound)).constant = true;
}
void end_launch(const void* bound) {
  recent = nullptr;
  memory.erase(static_cast<const char*>(bound));
}

void clear_shared(Block& block) {
  if (!shared_room)
    shared_room = static_cast<char*>(mmap(nullptr, kMostBlocks * kSharedRoom, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  memset(shared_room + block.place * kSharedRoom, engine.settings.poison, kSharedRoom);
  arrays[block.place].clear();
}

void* shared_array(const void* tag, size_t bytes, size_t element) {
  Block& b = *engine.running->block;
  const auto [at, is_new] = b.arrays.try_emplace(tag, nullptr);
  if (!is_new) return at->second;
  char* p = shared_room + b.place * kSharedRoom + b.shared_used;
  b.shared_used += (bytes + kGap + 127) / 128 * 128;
  if (b.shared_used > kSharedRoom) return report("more shared memory than any device has"), abort(), nullptr;
  arrays[b.place].emplace_back(p, bytes, std::min<size_t>(element, 4), "shared memory", false);
  size_t held = 0;
  for (const Range& r : arrays[b.place]) held += r.end - r.begin;
  most_shared = std::max(most_shared, held);
  return at->second = p;
}

void* dynamic_array() {
  static const char tag = 0;
  return shared_array(&tag, engine.shared_bytes, 1);
}

const char* too_much_shared() { return most_shared > kShared ? "too much shared memory" : nullptr; }

unsigned atomic_add(unsigned* at, unsigned x) {
  if (engine.settings.order == 2) give_way();
  checking = true;
  if (engine.checked) check_access(at, sizeof *at, true, true, __builtin_return_address(0));
  checking = false;
  Fiber& me = *engine.running;
  const char* p = reinterpret_cast<const char*>(at);
  if (!(p >= shared_room && p < shared_room + kMostBlocks * kSharedRoom)) {
    Known& known = released[at];
    join(known, me.released);
    join(me.seen, known);
  }
  const unsigned old = *at;
  *at = old + x;
  return old;
}

// publishes the block's writes before its last barrier, and acquires those seen at atomics
void fence() {
  Fiber& me = *engine.running;
  join(me.acquired, me.seen);
  join(me.released, me.acquired);
  join(me.released, me.block->known);
  me.released.resize(engine.blocks);
  me.released[me.block->number] = me.barriers;
}

void forget_memory() {
  recent = nullptr;
  memory.clear();
}

void know_memory(const void* p, size_t bytes, size_t element, const char* what) {
  if (bytes == 0) return;
  const char* begin = static_cast<const char*>(p);
  const Range* held = find(begin);
  if (held && begin + bytes <= held->end) return;
  add(Range(p, bytes, std::min<size_t>(element, 2), what, true));
}

void make_memory(void* p, size_t bytes, size_t element) {
  memset(p, engine.settings.poison, bytes);
  add(Range(p, bytes, std::min<size_t>(element, 2), "a fresh tensor", false));
}

void write_memory(const void* p, size_t bytes) {
  const char* begin = static_cast<const char*>(p);
  Range* range = bytes ? find(begin) : nullptr;
  if (!range) return;
  for (size_t i = 0; i < bytes; i += range->size) range->cells[(begin + i - range->begin) / range->size].valid = true;
}

}  // namespace simt

extern "C" {

#define ACCESS(name, bytes, write) \
  void name(void* p) { simt::access(p, bytes, write, __builtin_return_address(0)); }
#define ACCESSES(bytes)                              \
  ACCESS(__tsan_read##bytes, bytes, false)           \
  ACCESS(__tsan_write##bytes, bytes, true)           \
  ACCESS(__tsan_unaligned_read##bytes, bytes, false) \
  ACCESS(__tsan_unaligned_write##bytes, bytes, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { simt::access(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { simt::access(p, bytes, true, __builtin_return_address(0)); }

// host code in the same files needs these functions, but has nothing to check
void __tsan_init() { simt::engine.checked = true; }
void __tsan_vptr_update(void**, void*) {}
int __tsan_atomic32_fetch_add(volatile int* p, int x, int) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }
}
