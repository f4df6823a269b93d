#include "host/archive.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace vmemory::host {

namespace {

constexpr uint64_t kNowhere = ~uint64_t{0};
// sequences and frame numbers stay below: centuries of frames, and sums of two do not overflow
constexpr uint64_t kMost = uint64_t{1} << 48;

uint64_t blocks_for(uint64_t bytes, uint64_t payload) { return (bytes + payload - 1) / payload; }

uint64_t width_of(const std::vector<uint64_t>& widths) {
  return std::accumulate(widths.begin(), widths.end(), uint64_t{0});
}

// payload bytes of a block: of all sizes that come the one in whose blocks they lie with the least room to spare
uint64_t payload_for(const std::vector<uint64_t>& cells, uint64_t width) {
  std::vector<uint64_t> sizes;
  for (uint64_t n : cells)
    if (n > 0) sizes.push_back(n * width);
  // no entry leaves a memory without entries
  if (sizes.empty()) return width;
  const auto taken = [&sizes](uint64_t payload) {
    double ratio = 0;
    for (uint64_t size : sizes)
      ratio += static_cast<double>(blocks_for(size, payload) * Blocks::stride(payload)) / static_cast<double>(size);
    return ratio;
  };
  return *std::min_element(sizes.begin(), sizes.end(), [&](uint64_t a, uint64_t b) { return taken(a) < taken(b); });
}

// the payload, where the largest frame fits in the budget
uint64_t checked_payload(uint64_t budget, const std::vector<uint64_t>& cells, uint64_t width) {
  const uint64_t payload = payload_for(cells, width);
  const uint64_t largest = *std::max_element(cells.begin(), cells.end()) * width;
  const uint64_t least = Blocks::bytes(blocks_for(largest, payload), payload);
  if (budget < least)
    throw std::invalid_argument("budget: expected at least " + std::to_string(least) + " bytes for one frame, got " +
                                std::to_string(budget));
  return payload;
}

}  // namespace

Archive::Archive(uint64_t budget, const std::vector<uint64_t>& cells, const std::vector<uint64_t>& widths,
                 const std::string& path, const std::string& tag)
    : cells_(cells),
      widths_(widths),
      width_(width_of(widths)),
      blocks_(budget, checked_payload(budget, cells, width_), path, tag),
      process_(getpid()) {
  recover();
  worker_ = std::thread([this] { work(); });
}

Archive::~Archive() {
  {
    std::lock_guard lock(queue_lock_);
    stop_ = true;
  }
  changed_.notify_all();
  worker_.join();
}

bool Archive::forked() const { return getpid() != process_; }

void Archive::check_process() const {
  if (forked())
    throw std::runtime_error("archive: expected the process that made it, got one forked from it, which cannot write");
}

// whether `write` can have written this block; all further use of the header depends on this check
bool Archive::written_here(const BlockHeader& header) const {
  const auto& [stream, frame, first, last, frames, level] = header.facts.numbers;
  if (level < -1 || level + 1 >= static_cast<int64_t>(cells_.size())) return false;
  const uint64_t bytes = bytes_of(header.facts), payload = blocks_.payload();
  if (header.sequence == 0 || header.sequence >= kMost || bytes == 0 || header.parts != blocks_for(bytes, payload))
    return false;
  const bool whole = header.size == std::min(payload, bytes - header.part * payload);
  const bool counted = stream >= 0 && first >= 0 && first <= frame && frame <= last &&
                       static_cast<uint64_t>(last) < kMost && frames >= 1 && frames <= last - first + 1;
  for (double seconds : header.facts.clock)
    if (std::isinf(seconds)) return false;
  return whole && counted && !(header.facts.clock[2] < header.facts.clock[1]);
}

void Archive::recover() {
  for (uint64_t place = 0; place < blocks_.count(); ++place) {
    const auto header = blocks_.sealed(place);
    if (!header || !written_here(*header)) {
      free_.push_back(place);
      continue;
    }
    next_ = std::max(next_, header->sequence + 1);
    Entry& entry = entries_[header->sequence];
    if (entry.places.empty()) {
      entry.facts = header->facts;
      entry.places.assign(header->parts, kNowhere);
    }
    const bool other = std::memcmp(&entry.facts, &header->facts, sizeof entry.facts) != 0;
    if (other || entry.places[header->part] != kNowhere) {
      // no writer gives two frames one number, so neither can be trusted
      entry.torn = true;
      free_.push_back(place);
    } else {
      entry.places[header->part] = place;
    }
  }
  for (auto it = entries_.begin(); it != entries_.end();) {
    const auto& [sequence, entry] = *it++;
    index(sequence, entry.facts);
    // a killed process overwrote some of its blocks, or did not write all of them
    if (entry.torn || std::count(entry.places.begin(), entry.places.end(), kNowhere) > 0) drop(sequence);
  }
  // free blocks are zero; the first blocks are used first
  for (uint64_t place : free_) blocks_.wipe(place);
  std::sort(free_.rbegin(), free_.rend());
}

Archive::Key Archive::key_of(const Facts& facts) {
  const double start = facts.clock[1];
  return {facts.numbers[0], std::isnan(start) ? HUGE_VAL : start};
}

void Archive::index(uint64_t sequence, const Facts& facts) {
  by_start_.emplace(key_of(facts), sequence);
  longest_ = std::fmax(longest_, facts.clock[2] - facts.clock[1]);
}

void Archive::drop(uint64_t sequence) {
  const auto found = entries_.find(sequence);
  auto [at_key, end] = by_start_.equal_range(key_of(found->second.facts));
  by_start_.erase(std::find_if(at_key, end, [sequence](const auto& entry) { return entry.second == sequence; }));
  for (uint64_t place : found->second.places)
    if (place != kNowhere) free_.push_back(place);
  entries_.erase(found);
}

void Archive::write(uint64_t row) {
  Facts facts;
  std::memcpy(facts.numbers.data(), staging_.numbers + row * facts.numbers.size(), sizeof facts.numbers);
  std::memcpy(facts.clock.data(), staging_.clock + row * facts.clock.size(), sizeof facts.clock);
  const uint64_t cells = cells_.at(static_cast<uint64_t>(facts.numbers[5] + 1));
  const uint64_t parts = blocks_for(cells * width_, blocks_.payload());
  std::lock_guard lock(store_lock_);
  while (free_.size() < parts && !entries_.empty()) drop(entries_.begin()->first);
  if (free_.size() < parts) throw std::logic_error("archive: expected room for a frame once all others have left");
  Entry entry{{free_.end() - static_cast<int64_t>(parts), free_.end()}, facts};
  free_.resize(free_.size() - parts);
  // free blocks are zero, also the rest of a larger frame that was evicted
  for (auto place = free_.rbegin(); place != free_.rend() && !blocks_.wiped(*place); ++place) blocks_.wipe(*place);
  size_t piece = 0;
  uint64_t from = 0;
  for (uint64_t part = 0; part < parts; ++part) {
    const uint64_t place = entry.places[part];
    BlockHeader header{0, next_, facts, part, parts, 0, 0, 0};
    char* payload = blocks_.draft();
    while (header.size < blocks_.payload() && piece < widths_.size()) {
      const uint64_t width = widths_[piece], n = std::min(blocks_.payload() - header.size, cells * width - from);
      std::memcpy(payload + header.size, staging_.parts[piece] + row * apart_ * width + from, n);
      header.size += n;
      from += n;
      if (from == cells * width) {
        ++piece;
        from = 0;
      }
    }
    blocks_.seal(place, header);
  }
  entries_.emplace(next_, std::move(entry));
  index(next_++, facts);
}

void Archive::work() {
  std::unique_lock lock(queue_lock_);
  while (true) {
    changed_.wait(lock, [this] { return stop_ || pending_ > 0; });
    if (pending_ == 0) return;
    const uint64_t n = pending_;
    lock.unlock();
    std::string failed;
    try {
      blocks_.check();
      for (uint64_t row = 0; row < n; ++row) write(row);
    } catch (const std::exception& error) {
      failed = error.what();
    }
    lock.lock();
    pending_ = 0;
    if (!failed.empty()) failed_ = failed;
    changed_.notify_all();
  }
}

// with queue_lock_ held
void Archive::check_worker() const {
  if (!failed_.empty()) throw std::runtime_error(failed_);
}

void Archive::stage(const Staging& staging, uint64_t rows) {
  wait();
  std::lock_guard lock(queue_lock_);
  staging_ = staging;
  apart_ = rows;
}

void Archive::put(uint64_t n) {
  check_process();
  std::unique_lock lock(queue_lock_);
  changed_.wait(lock, [this] { return pending_ == 0; });
  check_worker();
  if (n > staging_.room)
    throw std::invalid_argument("n: expected at most " + std::to_string(staging_.room) + ", got " + std::to_string(n));
  // rows that the thread cannot write are refused here, because the caller can handle an error
  for (uint64_t row = 0; row < n; ++row) {
    const int64_t level = staging_.numbers[row * 6 + 5];
    if (level < -1 || level + 1 >= static_cast<int64_t>(cells_.size()) || cells_[static_cast<size_t>(level + 1)] == 0)
      throw std::invalid_argument("level: expected one that frames leave from, got " + std::to_string(level));
  }
  pending_ = n;
  changed_.notify_all();
}

bool Archive::busy() {
  check_process();
  std::lock_guard lock(queue_lock_);
  check_worker();
  return pending_ > 0;
}

void Archive::wait() {
  check_process();
  std::unique_lock lock(queue_lock_);
  changed_.wait(lock, [this] { return pending_ == 0; });
  check_worker();
}

void Archive::sync() {
  wait();
  std::lock_guard lock(store_lock_);
  blocks_.sync();
}

std::vector<uint64_t> Archive::overlapping(int64_t stream, double t0, double t1, bool any) const {
  std::vector<uint64_t> found;
  // no frame that starts earlier than the longest span before t0 can reach it
  auto it = by_start_.lower_bound(Key{stream, any ? -HUGE_VAL : t0 - longest_});
  for (; it != by_start_.end() && it->first.first == stream && (any || it->first.second <= t1); ++it)
    if (any || entries_.at(it->second).facts.clock[2] >= t0) found.push_back(it->second);
  return found;
}

std::vector<std::pair<uint64_t, Facts>> Archive::find(int64_t stream, double t0, double t1, bool any) {
  check_process();
  std::lock_guard lock(store_lock_);
  std::vector<std::pair<uint64_t, Facts>> found;
  for (uint64_t sequence : overlapping(stream, t0, t1, any)) found.emplace_back(sequence, entries_.at(sequence).facts);
  return found;
}

uint64_t Archive::read(uint64_t sequence, void* out, uint64_t room) {
  check_process();
  std::lock_guard lock(store_lock_);
  const auto found = entries_.find(sequence);
  if (found == entries_.end()) return 0;
  const Entry& entry = found->second;
  const uint64_t size = bytes_of(entry.facts), payload = blocks_.payload();
  if (room < size)
    throw std::invalid_argument("out: expected room for " + std::to_string(size) + " bytes, got " +
                                std::to_string(room));
  for (uint64_t part = 0; part < entry.places.size(); ++part) {
    const uint64_t from = part * payload;
    if (!blocks_.read(entry.places[part], sequence, part, static_cast<char*>(out) + from,
                      std::min(payload, size - from)))
      throw std::runtime_error("archive: the checksum of frame " + std::to_string(entry.facts.numbers[1]) +
                               " does not match");
  }
  return size;
}

uint64_t Archive::erase(int64_t stream, double t0, double t1, bool any) {
  wait();
  std::lock_guard lock(store_lock_);
  blocks_.check();
  const std::vector<uint64_t> gone = overlapping(stream, t0, t1, any);
  for (uint64_t sequence : gone) {
    for (uint64_t place : entries_.at(sequence).places) blocks_.wipe(place);
    drop(sequence);
  }
  return gone.size();
}

uint64_t Archive::next() {
  check_process();
  std::lock_guard lock(store_lock_);
  return next_;
}

uint64_t Archive::held() {
  check_process();
  std::lock_guard lock(store_lock_);
  return entries_.size();
}

}  // namespace vmemory::host
