// One team of threads for all products that are called one at a time from Python.
#pragma once

#include <mutex>

#include "common.hpp"
#include "team.hpp"

#ifndef _WIN32
#include <unistd.h>
#endif

namespace actlas {

// Runs work(0) ... work(parts - 1), each in a thread of a team that is kept between calls. Two callers at
// once do not wait for each other: the second starts threads of its own. Nor does a forked process wait for
// threads that only its parent has.
template <class Work> void run_together(std::size_t parts, const Work &work) {
#ifndef _WIN32
    struct Shared {
        explicit Shared(int threads) : team(threads) {}
        std::mutex busy;
        Team team;
        const pid_t process = getpid();
    };
    static std::mutex making;
    static Shared *shared = nullptr;  // never freed: its threads may not be joined while the process ends
    if (parts == 2) {
        Shared *mine = nullptr;
        if (making.try_lock()) {
            if (!shared || shared->process != getpid()) shared = new Shared(2);
            mine = shared;
            making.unlock();
        }
        if (mine && mine->team.size() == 2 && mine->busy.try_lock()) {
            mine->team.run([&](int part, int) { work(static_cast<std::size_t>(part)); });
            mine->busy.unlock();
            return;
        }
    }
#endif
    run_parts(parts, work);
}

// Splits 0 ... n - 1 among the team where there is enough to do; `cost` is the operations of one item.
template <class Work> void share_out(std::size_t n, std::size_t cost, int threads, const Work &work) {
    constexpr std::size_t kSmall = 1 << 16;  // waking a thread costs about a microsecond
    const std::size_t wanted = n * cost < kSmall ? 1 : static_cast<std::size_t>(std::max(threads, 1));
    const std::size_t parts = std::max<std::size_t>(1, std::min(wanted, n));
    run_together(parts, [&](std::size_t i) { work(n * i / parts, n * (i + 1) / parts); });
}

}  // namespace actlas
