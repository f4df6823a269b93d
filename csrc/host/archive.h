// Bounded host store of frames that left a memory: fixed blocks in anonymous or file-backed memory, written by a
// thread.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
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

class Archive {
 public:
  // an empty path keeps the blocks in RAM; tag says whose frames they are, and must be the same when a file is reopened
  Archive(uint64_t budget, uint64_t payload, const std::string& path, const std::string& tag);
  ~Archive();
  Archive(const Archive&) = delete;
  Archive& operator=(const Archive&) = delete;

  // copies the payload and returns; false when the queue is full and wait is not wanted
  bool put(const void* payload, uint64_t size, const Facts& facts, bool wait);
  // waits until all that was put lies in its block, and for a file also on disk
  void flush();
  // sequence and facts of the blocks that overlap [t0, t1], oldest frame first; all of the stream with any
  std::vector<std::pair<uint64_t, Facts>> find(int64_t stream, double t0, double t1, bool any);
  // payload bytes copied to out (room bytes there), 0 when the block has left meanwhile
  uint64_t read(uint64_t sequence, void* out, uint64_t room);
  // overwrites the blocks that overlap [t0, t1] with zeros
  uint64_t erase(int64_t stream, double t0, double t1);
  uint64_t held();
  uint64_t capacity() const { return capacity_; }

 private:
  struct Block {
    uint64_t place;
    Facts facts;
  };
  struct Pending {
    Facts facts;
    std::vector<char> payload;
  };
  using Key = std::pair<int64_t, double>;

  void open(const std::string& path, const std::string& tag);
  void recover();
  void work();
  void write(const Pending& pending);
  void add(uint64_t sequence, const Block& block);
  void drop(uint64_t sequence);
  std::vector<uint64_t> overlapping(int64_t stream, double t0, double t1, bool any) const;
  char* at(uint64_t place) const { return data_ + kPage + place * stride_; }
  void close();

  static constexpr uint64_t kPage = 4096;
  uint64_t payload_, stride_, capacity_, bytes_;
  int file_ = -1;
  char* data_ = nullptr;
  std::map<uint64_t, Block> blocks_;
  std::multimap<Key, uint64_t> by_start_;
  double longest_ = 0;
  std::vector<uint64_t> free_;
  uint64_t next_ = 1;

  std::mutex queue_lock_, store_lock_;
  std::condition_variable changed_;
  std::deque<Pending> queue_;
  bool busy_ = false, stop_ = false;
  std::thread worker_;
};

}  // namespace vmemory::host
