#include "host/archive.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace vmemory::host {

namespace {

constexpr uint64_t kMagic = 0x324b434c424d4556;  // "VEMBLCK2"
constexpr uint64_t kTag = 1024;

uint64_t mixed(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
  return hash ^ hash >> 29;
}

// four sums beside each other: one alone waits for its own multiplications
uint64_t checksum(const void* bytes, uint64_t size, uint64_t seed) {
  const char* at = static_cast<const char*>(bytes);
  uint64_t hash[4], word[4];
  for (uint64_t lane = 0; lane < 4; ++lane) hash[lane] = mixed(seed, lane);
  uint64_t i = 0;
  for (; i + sizeof word <= size; i += sizeof word) {
    std::memcpy(word, at + i, sizeof word);
    for (int lane = 0; lane < 4; ++lane) hash[lane] = mixed(hash[lane], word[lane]);
  }
  std::memset(word, 0, sizeof word);
  std::memcpy(word, at + i, size - i);
  for (int lane = 0; lane < 4; ++lane) seed = mixed(seed, mixed(hash[lane], word[lane]));
  return seed;
}

uint64_t seal(const BlockHeader& header, const void* payload) {
  return checksum(payload, header.size, checksum(&header, offsetof(BlockHeader, checksum), 0));
}

struct Page {
  uint64_t magic, payload, capacity, checksum;
  char tag[kTag];
};

uint64_t seal(const Page& page) { return checksum(page.tag, kTag, page.magic ^ page.payload ^ (page.capacity << 20)); }

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error(path + ": " + what);
}

}  // namespace

Archive::Archive(uint64_t budget, const std::vector<uint64_t>& cells, const std::vector<uint64_t>& widths,
                 const std::string& path, const std::string& tag)
    : cells_(cells), widths_(widths) {
  payload_ = *std::max_element(cells.begin(), cells.end()) * std::accumulate(widths.begin(), widths.end(), uint64_t{0});
  stride_ = (sizeof(BlockHeader) + payload_ + 63) / 64 * 64;
  if (budget < kPage + stride_)
    throw std::invalid_argument("budget: expected at least " + std::to_string(kPage + stride_) +
                                " bytes for one frame, got " + std::to_string(budget));
  if (tag.size() >= kTag) throw std::invalid_argument("tag: expected less than 1024 bytes");
  capacity_ = (budget - kPage) / stride_;
  bytes_ = kPage + capacity_ * stride_;
  try {
    open(path, tag);
    recover();
  } catch (...) {
    close();
    throw;
  }
  worker_ = std::thread([this] { work(); });
}

Archive::~Archive() {
  {
    std::lock_guard lock(queue_lock_);
    stop_ = true;
  }
  changed_.notify_all();
  worker_.join();
  close();
}

void Archive::close() {
  if (data_ != nullptr) {
    if (file_ >= 0) msync(data_, bytes_, MS_SYNC);
    munmap(data_, bytes_);
    data_ = nullptr;
  }
  if (file_ >= 0) ::close(file_);
  file_ = -1;
}

void Archive::open(const std::string& path, const std::string& tag) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  bool fresh = true;
  if (!path.empty()) {
    flags = MAP_SHARED;
    file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file_ < 0) fail(path, std::strerror(errno));
    if (flock(file_, LOCK_EX | LOCK_NB) != 0) fail(path, "another archive has this file open");
    struct stat facts;
    if (fstat(file_, &facts) != 0) fail(path, std::strerror(errno));
    if (!S_ISREG(facts.st_mode)) fail(path, "expected a regular file");
    fresh = facts.st_size == 0;
    if (!fresh && static_cast<uint64_t>(facts.st_size) != bytes_)
      fail(path, "expected an archive of " + std::to_string(bytes_) + " bytes, got " + std::to_string(facts.st_size));
    // space is taken at once: a full disk is an error here, and not a signal at some later write
    if (fresh && fallocate(file_, 0, 0, static_cast<off_t>(bytes_)) != 0 &&
        (errno != EOPNOTSUPP || ftruncate(file_, static_cast<off_t>(bytes_)) != 0)) {
      const std::string what = std::strerror(errno);
      unlink(path.c_str());
      fail(path, what);
    }
  }
  void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, file_, 0);
  if (mapped == MAP_FAILED) fail(path, std::strerror(errno));
  data_ = static_cast<char*>(mapped);
  Page* page = reinterpret_cast<Page*>(data_);
  // a file killed before its first page was written holds nothing yet
  if (page->magic == 0) fresh = true;
  if (fresh) {
    Page made{kMagic, payload_, capacity_, 0, {}};
    std::memcpy(made.tag, tag.data(), tag.size());
    made.checksum = seal(made);
    std::memcpy(page, &made, sizeof made);
    return;
  }
  if (page->magic != kMagic || page->checksum != seal(*page)) fail(path, "not an archive");
  if (page->payload != payload_ || std::strncmp(page->tag, tag.c_str(), kTag) != 0)
    fail(path, "expected the frames of " + tag + ", got those of " + std::string(page->tag));
}

void Archive::recover() {
  used_.assign(capacity_, 0);
  for (uint64_t place = 0; place < capacity_; ++place) {
    BlockHeader header;
    if (file_ >= 0) {
      std::memcpy(&header, at(place), sizeof header);
      const bool whole = header.magic == kMagic && header.size <= payload_ &&
                         header.checksum == seal(header, at(place) + sizeof header);
      if (whole) {
        add(header.sequence, {place, header.facts});
        next_ = std::max(next_, header.sequence + 1);
        used_[place] = header.size;
        continue;
      }
      // the rest of a block that a killed process did not finish
      if (header.magic != 0 || header.sequence != 0) std::memset(at(place), 0, stride_);
    }
    free_.push_back(place);
  }
  std::reverse(free_.begin(), free_.end());
}

void Archive::add(uint64_t sequence, const Block& block) {
  blocks_[sequence] = block;
  const double start = block.facts.clock[1];
  by_start_.emplace(Key{block.facts.numbers[0], std::isnan(start) ? HUGE_VAL : start}, sequence);
  if (block.facts.clock[2] - start > longest_) longest_ = block.facts.clock[2] - start;
}

void Archive::drop(uint64_t sequence) {
  const auto found = blocks_.find(sequence);
  const Facts& facts = found->second.facts;
  const double start = facts.clock[1];
  auto [at_key, end] = by_start_.equal_range(Key{facts.numbers[0], std::isnan(start) ? HUGE_VAL : start});
  for (; at_key != end; ++at_key)
    if (at_key->second == sequence) {
      by_start_.erase(at_key);
      break;
    }
  free_.push_back(found->second.place);
  blocks_.erase(found);
}

void Archive::write(uint64_t row) {
  Facts facts;
  std::memcpy(facts.numbers.data(), staging_.numbers + row * facts.numbers.size(), sizeof facts.numbers);
  std::memcpy(facts.clock.data(), staging_.clock + row * facts.clock.size(), sizeof facts.clock);
  const uint64_t cells = cells_.at(static_cast<uint64_t>(facts.numbers[5] + 1));
  std::lock_guard lock(store_lock_);
  if (free_.empty()) drop(blocks_.begin()->first);
  const uint64_t place = free_.back();
  free_.pop_back();
  char* block = at(place);
  BlockHeader header{kMagic, next_++, facts, 0, 0, {}};
  // the header goes last: until then the block counts as torn, whatever the payload holds
  std::memset(block, 0, sizeof header);
  reinterpret_cast<BlockHeader*>(block)->sequence = header.sequence;
  std::atomic_signal_fence(std::memory_order_seq_cst);
  char* payload = block + sizeof header;
  for (size_t part = 0; part < widths_.size(); ++part) {
    std::memcpy(payload + header.size, staging_.parts[part] + row * apart_ * widths_[part], cells * widths_[part]);
    header.size += cells * widths_[part];
  }
  // nothing of a frame that lay here and was longer
  if (used_[place] > header.size) std::memset(payload + header.size, 0, used_[place] - header.size);
  used_[place] = header.size;
  header.checksum = seal(header, payload);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  std::memcpy(block, &header, sizeof header);
  add(header.sequence, {place, header.facts});
}

void Archive::work() {
  std::unique_lock lock(queue_lock_);
  while (true) {
    changed_.wait(lock, [this] { return stop_ || pending_ > 0; });
    if (pending_ == 0) return;
    const uint64_t n = pending_;
    lock.unlock();
    for (uint64_t row = 0; row < n; ++row) write(row);
    lock.lock();
    pending_ = 0;
    changed_.notify_all();
  }
}

void Archive::stage(const Staging& staging, uint64_t rows) {
  wait();
  std::lock_guard lock(queue_lock_);
  staging_ = staging;
  apart_ = rows;
}

void Archive::put(uint64_t n) {
  std::unique_lock lock(queue_lock_);
  changed_.wait(lock, [this] { return pending_ == 0; });
  if (n > staging_.room)
    throw std::invalid_argument("n: expected at most " + std::to_string(staging_.room) + ", got " + std::to_string(n));
  // what the thread cannot write is refused here, where somebody can be told
  for (uint64_t row = 0; row < n; ++row) {
    const int64_t level = staging_.numbers[row * 6 + 5];
    if (level < -1 || level + 1 >= static_cast<int64_t>(cells_.size()))
      throw std::invalid_argument("level: expected one of the archive's, got " + std::to_string(level));
  }
  pending_ = n;
  changed_.notify_all();
}

bool Archive::busy() {
  std::lock_guard lock(queue_lock_);
  return pending_ > 0;
}

void Archive::wait() {
  std::unique_lock lock(queue_lock_);
  changed_.wait(lock, [this] { return pending_ == 0; });
}

void Archive::sync() {
  wait();
  std::lock_guard lock(store_lock_);
  if (file_ >= 0 && msync(data_, bytes_, MS_SYNC) != 0)
    throw std::runtime_error(std::string("archive: ") + std::strerror(errno));
}

std::vector<uint64_t> Archive::overlapping(int64_t stream, double t0, double t1, bool any) const {
  std::vector<uint64_t> found;
  // no entry that starts earlier than the longest span before t0 can reach it
  auto it = by_start_.lower_bound(Key{stream, any ? -HUGE_VAL : t0 - longest_});
  for (; it != by_start_.end() && it->first.first == stream && (any || it->first.second <= t1); ++it)
    if (any || blocks_.at(it->second).facts.clock[2] >= t0) found.push_back(it->second);
  return found;
}

std::vector<std::pair<uint64_t, Facts>> Archive::find(int64_t stream, double t0, double t1, bool any) {
  std::lock_guard lock(store_lock_);
  std::vector<std::pair<uint64_t, Facts>> found;
  for (uint64_t sequence : overlapping(stream, t0, t1, any)) found.emplace_back(sequence, blocks_.at(sequence).facts);
  return found;
}

uint64_t Archive::read(uint64_t sequence, void* out, uint64_t room) {
  std::lock_guard lock(store_lock_);
  const auto found = blocks_.find(sequence);
  if (found == blocks_.end()) return 0;
  const char* block = at(found->second.place);
  BlockHeader header;
  std::memcpy(&header, block, sizeof header);
  if (header.size > room || header.checksum != seal(header, block + sizeof header))
    throw std::runtime_error("archive: the checksum of frame " + std::to_string(found->second.facts.numbers[1]) +
                             " does not match");
  std::memcpy(out, block + sizeof header, header.size);
  return header.size;
}

uint64_t Archive::erase(int64_t stream, double t0, double t1, bool any) {
  wait();
  std::lock_guard lock(store_lock_);
  const std::vector<uint64_t> gone = overlapping(stream, t0, t1, any);
  for (uint64_t sequence : gone) {
    const uint64_t place = blocks_.at(sequence).place;
    std::memset(at(place), 0, stride_);
    used_[place] = 0;
    drop(sequence);
  }
  return gone.size();
}

uint64_t Archive::next() {
  std::lock_guard lock(store_lock_);
  return next_;
}

uint64_t Archive::held() {
  std::lock_guard lock(store_lock_);
  return blocks_.size();
}

}  // namespace vmemory::host
