// A team of threads that stays between calls: starting threads would cost more than a small matrix product.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace actlas {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// `run(work)` calls work(part, parts) once in every thread and returns when all have ended. The others wait
// for a while in a loop, which costs a fraction of a microsecond, and sleep after that.
class Team {
  public:
    explicit Team(int threads) {
        for (int i = 1; i < threads; ++i) {
            try {
                others_.emplace_back([this, i] { serve(i); });
            } catch (const std::system_error &) {
                break;  // the system grants no more; fewer do the work
            }
        }
    }
    ~Team() {
        {
            std::lock_guard<std::mutex> held(mutex_);
            stop_.store(true);
            turn_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto &thread : others_) thread.join();
    }
    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;

    int size() const { return static_cast<int>(others_.size()) + 1; }

    template <class Work> void run(const Work &work) {
        const int parts = size();
        if (parts == 1) {
            work(0, 1);
            return;
        }
        work_ = [&work, parts](int part) { work(part, parts); };
        left_.store(parts - 1, std::memory_order_relaxed);
        {
            // The lock orders this with a thread that is about to sleep.
            std::lock_guard<std::mutex> held(mutex_);
            turn_.fetch_add(1, std::memory_order_release);
        }
        if (asleep_.load(std::memory_order_acquire) > 0) wake_.notify_all();
        work(0, parts);
        for (int i = 0; left_.load(std::memory_order_acquire) > 0; ++i) {
            if (i < kSpins)
                relax();
            else
                std::this_thread::yield();
        }
    }

  private:
    static constexpr int kSpins = 1 << 14;

    void serve(int part) {
        unsigned seen = 0;
        while (true) {
            bool came = false;
            for (int i = 0; i < kSpins && !came; ++i) {
                came = turn_.load(std::memory_order_acquire) != seen;
                if (!came) relax();
            }
            if (!came) {
                std::unique_lock<std::mutex> held(mutex_);
                asleep_.fetch_add(1);
                wake_.wait(held, [&] { return turn_.load(std::memory_order_acquire) != seen; });
                asleep_.fetch_sub(1);
            }
            ++seen;
            if (stop_.load()) return;
            work_(part);
            left_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    std::vector<std::thread> others_;
    std::function<void(int)> work_;
    std::atomic<unsigned> turn_{0};
    std::atomic<int> left_{0}, asleep_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace actlas
