// The emulator's inside: the running fiber, its block, and what each has passed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "simt/language.h"

namespace simt {

struct Settings {
  uint64_t seed = 1;
  int order = 0;         // of threads and blocks: 0 forward, 1 reverse, 2 random
  int preempt = 0;       // one of so many accesses gives way to another thread, 0 = none
  int side_by_side = 4;  // blocks of an ordinary launch that are under way together
  int processors = 4;
  int poison = 0xff;  // every byte of memory that holds nothing yet
};

// What a fiber has passed when it touches memory. Between two accesses of different threads lies an order if the second
// thread has passed a meeting of both since.
struct Moment {
  uint32_t thread = 0;  // of the launch, from 1 on; 0 = nobody
  uint32_t barriers = 0, warp_barriers = 0;
  uint16_t grid_barriers = 0, launch = 0;
};

// barriers that each block of the launch is known to have passed
using Known = std::vector<uint32_t>;
inline void join(Known& to, const Known& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = to[i] < from[i] ? from[i] : to[i];
}

enum class State : uint8_t { kReady, kInWarp, kInBlock, kInGrid, kDone };

struct Block;
struct Fiber {
  jmp_buf resume;
  ucontext_t start;
  bool begun = false;
  Block* block = nullptr;
  unsigned thread = 0;  // of the block
  State state = State::kDone;
  At at{};
  Exchange what{};
  unsigned mask = 0, from = 0;
  uint64_t value = 0;  // brought to a meeting, then taken from it
  uint32_t barriers = 0, warp_barriers = 0, grid_barriers = 0;
  Known seen, acquired, released;  // at atomics, since a fence, and what a fence let others see
};

struct Block {
  uint3 index{};
  uint32_t number = 0, place = 0;  // of the launch, and where its stacks and its shared memory lie
  std::vector<Fiber*> fibers;
  unsigned alive = 0, waiting = 0;
  int count = 0;
  Known known;
  size_t shared_used = 0;
  std::map<const void*, void*> arrays;
};

struct Engine {
  Settings settings;
  Fiber* running = nullptr;  // null: the host
  uint32_t threads = 0;      // of a block
  uint32_t blocks = 0;
  uint16_t launch = 0;
  size_t shared_bytes = 0;  // of a block, dynamic
  bool checked = false;     // the kernels call the checks
};
extern Engine engine;

uint64_t random_bits();
void report(const std::string& what);
std::string text_of(At at);
void give_way();

// memory.cpp
void begin_launch(const void* bound, size_t bytes);
void end_launch(const void* bound);
void clear_shared(Block& block);
void check_access(const void* p, size_t bytes, bool write, bool atomic, const void* pc);
const char* too_much_shared();
bool on_a_stack(const void* p);

}  // namespace simt
