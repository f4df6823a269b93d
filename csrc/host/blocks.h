// Blocks of one size in RAM or in a file, each sealed by a checksum. A file is read and written by calls, not mapped,
// so that a truncated file or a full disk is an error and not a signal.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace vmemory::host {

// facts about a frame: stream, frame, first, last, frames merged, level; seconds: time, start, stop
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

  // bytes of n blocks and the header page
  static uint64_t bytes(uint64_t n, uint64_t payload) { return kPage + n * stride(payload); }
  static uint64_t stride(uint64_t payload) { return (sizeof(BlockHeader) + payload + 63) / 64 * 64; }

  uint64_t count() const { return count_; }
  uint64_t payload() const { return payload_; }
  // the header of a block of the opened file, or nothing if it is not sealed; such a block must be wiped before it is
  // used
  std::optional<BlockHeader> sealed(uint64_t place);
  // the buffer for the payload of the next block to be sealed
  char* draft() { return scratch_.data() + sizeof(BlockHeader); }
  // writes the draft's header.size bytes of payload with the header; a kill in between leaves a torn block
  void seal(uint64_t place, BlockHeader header);
  // the payload copied to out, `size` bytes; false if the block was altered from outside
  bool read(uint64_t place, uint64_t sequence, uint64_t part, char* out, uint64_t size) const;
  bool wiped(uint64_t place) const { return used_[place] == 0; }
  void wipe(uint64_t place);
  // throws where the file has been removed or cut short since it was opened
  void check() const;
  // waits until a file lies on disk
  void sync() const;

 private:
  void open(const std::string& path, const std::string& tag);
  void close();
  uint64_t at(uint64_t place) const { return kPage + place * stride_; }
  void load(uint64_t from, void* out, uint64_t n) const;
  void store(uint64_t to, const void* bytes, uint64_t n);

  static constexpr uint64_t kPage = 4096;
  uint64_t payload_, stride_, count_, bytes_;
  int file_ = -1;
  char* data_ = nullptr;  // of blocks in RAM
  // a block on its way
  std::vector<char> scratch_;
  // bytes of each block, header included, that are not known to be zero
  std::vector<uint64_t> used_;
};

}  // namespace vmemory::host
