// Bounded host store of frames that left a memory: fixed blocks in anonymous or file-backed memory, written by a
// thread.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace vmemory::host {

// what is known of a frame: stream, frame, first, last, frames merged, level; seconds: time, start, stop
struct Facts {
  std::array<int64_t, 6> numbers;
  std::array<double, 3> clock;
};

struct BlockHeader {
  uint64_t magic;
  uint64_t sequence;  // grows with every block written: the smallest is the oldest
  Facts facts;
  uint64_t size;      // payload bytes
  uint64_t checksum;  // of all above and the payload
  uint64_t unused[3];
};
static_assert(sizeof(BlockHeader) == 128);

// where a batch of frames lies until the thread has written it: row i of each part, of the numbers and of the clock
struct Staging {
  std::vector<const char*> parts;
  const int64_t* numbers;
  const double* clock;
  uint64_t room;
};

class Archive {
 public:
  // cells: tokens of a frame of each level, from level -1 on; widths: bytes of a token in each part of a frame;
  // an empty path keeps the blocks in RAM; tag says whose frames they are, and must be the same when a file is reopened
  Archive(uint64_t budget, const std::vector<uint64_t>& cells, const std::vector<uint64_t>& widths,
          const std::string& path, const std::string& tag);
  ~Archive();
  Archive(const Archive&) = delete;
  Archive& operator=(const Archive&) = delete;

  // memory of batches, as long as the archive or another stage call; rows of a part lie `rows` tokens apart
  void stage(const Staging& staging, uint64_t rows);
  // has the first n frames of the staging memory written, which belongs to the thread until then
  void put(uint64_t n);
  // whether the thread has frames still to write
  bool busy();
  // waits until all that was put lies in its block
  void wait();
  // waits, and for a file until it lies on disk
  void sync();
  // sequence and facts of the blocks that overlap [t0, t1], oldest frame first; all of the stream with any
  std::vector<std::pair<uint64_t, Facts>> find(int64_t stream, double t0, double t1, bool any);
  // payload bytes copied to out (room bytes there), 0 when the block has left meanwhile
  uint64_t read(uint64_t sequence, void* out, uint64_t room);
  // overwrites the blocks that overlap [t0, t1] with zeros, or all of the stream with any; sync brings that to the disk
  uint64_t erase(int64_t stream, double t0, double t1, bool any);
  uint64_t held();
  // sequence of the next block: all there are have smaller ones
  uint64_t next();
  uint64_t capacity() const { return capacity_; }

 private:
  struct Block {
    uint64_t place;
    Facts facts;
  };
  using Key = std::pair<int64_t, double>;

  void open(const std::string& path, const std::string& tag);
  void recover();
  void work();
  void write(uint64_t row);
  void add(uint64_t sequence, const Block& block);
  void drop(uint64_t sequence);
  std::vector<uint64_t> overlapping(int64_t stream, double t0, double t1, bool any) const;
  char* at(uint64_t place) const { return data_ + kPage + place * stride_; }
  void close();

  static constexpr uint64_t kPage = 4096;
  std::vector<uint64_t> cells_, widths_;
  uint64_t payload_, stride_, capacity_, bytes_;
  int file_ = -1;
  char* data_ = nullptr;
  std::map<uint64_t, Block> blocks_;
  std::multimap<Key, uint64_t> by_start_;
  double longest_ = 0;
  std::vector<uint64_t> free_;
  // payload bytes of each place that are not known to be zero
  std::vector<uint64_t> used_;
  uint64_t next_ = 1;

  std::mutex queue_lock_, store_lock_;
  std::condition_variable changed_;
  Staging staging_{};
  uint64_t apart_ = 0, pending_ = 0;
  bool stop_ = false;
  std::thread worker_;
};

}  // namespace vmemory::host
