// The threads of a block, or of the blocks of one cluster together, as threads of the operating system, for
// ThreadSanitizer: it knows two accesses to be in order only if a barrier of the kernel stands between them, in whatever
// order they happened to run. One block or cluster runs at a time, so that it says nothing about accesses of several.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "poison.h"

// ThreadSanitizer's own functions: what is between them puts nothing in order.
extern "C" void AnnotateIgnoreSyncBegin(const char* file, int line);
extern "C" void AnnotateIgnoreSyncEnd(const char* file, int line);

namespace vtexport::emulator {

enum class Order { kForward, kBackward, kRandom };

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

class Block {
 public:
  static constexpr unsigned kWarp = 32;

  void run(unsigned threads_each, unsigned blocks, size_t shared, Order, std::mt19937& generator,
           const std::function<void()>& body) {
    const unsigned threads = threads_each * blocks;
    each_ = threads_each;
    all_ = threads;
    arrived_ = phase_ = 0;
    waits_ = 0;
    arrivals_.assign(threads, 0);
    votes_ = std::vector<std::atomic<uint64_t>>(threads);
    shared_size_ = (shared + 127) / 128 * 128;
    shared_.reset(new (std::align_val_t(128)) unsigned char[shared_size_ * blocks + 1]);
    poison(shared_.get(), shared_size_ * blocks, generator());
    poison_static_shared(generator());
    warps_.clear();
    blocks_.clear();
    for (unsigned first = 0; first < threads; first += kWarp) {
      warps_.push_back(std::make_unique<Barrier>(threads - first < kWarp ? threads - first : kWarp));
    }
    for (unsigned b = 0; b < blocks; ++b) blocks_.push_back(std::make_unique<Barrier>(threads_each));
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t) {
      running.emplace_back([this, t, &body] {
        current_ = t;
        body();
      });
    }
    for (std::thread& thread : running) thread.join();
  }

  unsigned thread() const { return current_ % each_; }
  unsigned rank() const { return current_ / each_; }
  unsigned thread_of_cluster() const { return current_; }
  unsigned threads() const { return each_; }
  unsigned char* shared() { return shared_.get() + rank() * shared_size_; }
  const void* shared_of(unsigned rank, const void* own) const {
    return static_cast<const unsigned char*>(own) + (static_cast<ptrdiff_t>(rank) - this->rank()) * shared_size_;
  }

  void arrive() {
    std::lock_guard<std::mutex> lock(mutex_);
    arrivals_[current_] = phase_;
    if (++arrived_ < all_) return;
    arrived_ = 0;
    ++phase_;
    everyone_.notify_all();
  }
  void wait_for_cluster() {
    std::unique_lock<std::mutex> lock(mutex_);
    everyone_.wait(lock, [this] { return phase_ != arrivals_[current_]; });
  }

  void wait(bool whole_block) { (whole_block ? blocks_[rank()] : warps_[current_ / kWarp])->wait(); }
  void meet() {
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    wait(false);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  }

  void waited_for_previous() { ++waits_; }
  unsigned waits() const { return waits_; }

  template <typename T>
  void say(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    votes_[current_].store(bits, std::memory_order_relaxed);
  }
  template <typename T>
  T heard(unsigned thread) const {
    const uint64_t bits = votes_[rank() * each_ + thread].load(std::memory_order_relaxed);
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const { operator delete[](memory, std::align_val_t(128)); }
  };

  static inline thread_local unsigned current_ = 0;
  unsigned each_ = 1, all_ = 1, arrived_ = 0, phase_ = 0;
  std::atomic<unsigned> waits_{0};
  size_t shared_size_ = 0;
  std::unique_ptr<unsigned char[], Free> shared_;
  std::vector<std::unique_ptr<Barrier>> warps_, blocks_;
  std::vector<std::atomic<uint64_t>> votes_;
  std::vector<unsigned> arrivals_;
  std::mutex mutex_;
  std::condition_variable everyone_;
};

inline Block block;

}  // namespace vtexport::emulator
