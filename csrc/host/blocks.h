// Blocks of one size in anonymous memory or in a memory-mapped file, each sealed by a checksum.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace vmemory::host {

// what is known of a frame: stream, frame, first, last, frames merged, level; seconds: time, start, stop
struct Facts {
  std::array<int64_t, 6> numbers;
  std::array<double, 3> clock;
};

struct BlockHeader {
  uint64_t magic;
  uint64_t sequence;  // of the frame, grows with every frame written: the smallest is the oldest
  Facts facts;
  uint64_t part, parts;  // a frame larger than a block lies in several
  uint64_t size;         // payload bytes
  uint64_t checksum;     // of all above and the payload
  uint64_t unused;
};
static_assert(sizeof(BlockHeader) == 128);

class Blocks {
 public:
  // as many blocks with room for `payload` bytes as fit in `budget`; an empty path keeps them in RAM; tag says whose
  // frames they hold, and must be the same when a file is opened again
  Blocks(uint64_t budget, uint64_t payload, const std::string& path, const std::string& tag);
  ~Blocks();
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;

  // bytes of n blocks and what else there is
  static uint64_t bytes(uint64_t n, uint64_t payload) { return kPage + n * stride(payload); }
  static uint64_t stride(uint64_t payload) { return (sizeof(BlockHeader) + payload + 63) / 64 * 64; }

  uint64_t count() const { return count_; }
  uint64_t payload() const { return payload_; }
  // what a block of the opened file holds; nothing if it is free, which it becomes when it is torn
  std::optional<BlockHeader> recover(uint64_t place);
  // room for a payload; until it is sealed the block counts as torn
  char* begin(uint64_t place, uint64_t sequence);
  // makes header and the header.size bytes of payload written since `begin` count
  void seal(uint64_t place, BlockHeader header);
  // payload bytes copied to out, which has room for room bytes; nothing if the block was altered from outside
  std::optional<uint64_t> read(uint64_t place, uint64_t sequence, uint64_t part, char* out, uint64_t room) const;
  bool wiped(uint64_t place) const { return used_[place] == 0; }
  void wipe(uint64_t place);
  // waits until a file lies on disk
  void sync();

 private:
  void open(const std::string& path, const std::string& tag);
  void close();
  char* at(uint64_t place) const { return data_ + kPage + place * stride_; }

  static constexpr uint64_t kPage = 4096;
  uint64_t payload_, stride_, count_, bytes_;
  int file_ = -1;
  char* data_ = nullptr;
  // bytes of each block, header included, that are not known to be zero
  std::vector<uint64_t> used_;
};

}  // namespace vmemory::host
