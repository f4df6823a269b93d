// Bounded host store of frames that left a memory, written by a thread. Beside the blocks it keeps an index of about
// 250 bytes an entry, which the budget does not count.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "host/blocks.h"

namespace vmemory::host {

// memory of a batch of frames until the thread has written it: row i of each part, of the numbers and of the clock
struct Staging {
  std::vector<const char*> parts;
  const int64_t* numbers;
  const double* clock;
  uint64_t room;
};

class Archive {
 public:
  // cells: tokens of a frame of each level, from level -1 on, 0 = frames of that level never come; widths: bytes of a
  // token in each part of a frame; path and tag as in Blocks
  Archive(uint64_t budget, const std::vector<uint64_t>& cells, const std::vector<uint64_t>& widths,
          const std::string& path, const std::string& tag);
  ~Archive();
  Archive(const Archive&) = delete;
  Archive& operator=(const Archive&) = delete;

  // memory of batches, as long as the archive or another stage call; rows of a part lie `rows` tokens apart
  void stage(const Staging& staging, uint64_t rows);
  // lets the thread write the first n frames of the staging memory, which must not change until then
  void put(uint64_t n);
  // whether the thread has frames to write; this and all functions below throw the error that stopped the thread
  bool busy();
  // waits until all frames given to `put` are in their blocks
  void wait();
  // waits as above, and for a file until it is on disk
  void sync();
  // sequence and facts of the frames that overlap [t0, t1], oldest frame first; all of the stream with any
  std::vector<std::pair<uint64_t, Facts>> find(int64_t stream, double t0, double t1, bool any);
  // payload bytes copied to out (room bytes there), 0 when the frame has left meanwhile; never a part of them
  uint64_t read(uint64_t sequence, void* out, uint64_t room);
  // overwrites frames that overlap [t0, t1] with zeros, or all of the stream with any; call sync to write this to disk
  uint64_t erase(int64_t stream, double t0, double t1, bool any);
  uint64_t held();
  // sequence of the next frame: all there are have smaller ones
  uint64_t next();
  // frames there is room for where all are of the size that fills a block
  uint64_t capacity() const { return blocks_.count(); }
  // whether this is a copy in a forked process, which has no thread
  bool forked() const;

 private:
  struct Entry {
    std::vector<uint64_t> places;
    Facts facts;
    bool torn = false;
  };
  using Key = std::pair<int64_t, double>;

  static Key key_of(const Facts& facts);
  uint64_t bytes_of(const Facts& facts) const { return cells_[static_cast<size_t>(facts.numbers[5] + 1)] * width_; }
  bool written_here(const BlockHeader& header) const;
  void recover();
  void work();
  void write(uint64_t row);
  void index(uint64_t sequence, const Facts& facts);
  void drop(uint64_t sequence);
  void check_process() const;
  void check_worker() const;
  std::vector<uint64_t> overlapping(int64_t stream, double t0, double t1, bool any) const;

  std::vector<uint64_t> cells_, widths_;
  // bytes of a token in all parts
  uint64_t width_;
  Blocks blocks_;
  std::map<uint64_t, Entry> entries_;
  std::multimap<Key, uint64_t> by_start_;
  double longest_ = 0;
  std::vector<uint64_t> free_;
  uint64_t next_ = 1;

  const pid_t process_;
  std::mutex queue_lock_, store_lock_;
  std::condition_variable changed_;
  Staging staging_{};
  uint64_t apart_ = 0, pending_ = 0;
  bool stop_ = false;
  // why the thread no longer writes
  std::string failed_;
  std::thread worker_;
};

}  // namespace vmemory::host
