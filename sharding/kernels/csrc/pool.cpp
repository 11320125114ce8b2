#include "pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

namespace longspan {
namespace {

constexpr uint32_t OPEN = 1u << 31;
constexpr std::chrono::microseconds PATIENCE{60}, PATIENCE_IN_RUN{200};
constexpr int FEW_TASKS = 1500;  // pauses, some 30 microseconds

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) : threads_(threads), ranges_(new Range[static_cast<size_t>(threads)]) {
    workers_.reserve(static_cast<size_t>(threads));
    try {
        for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
    } catch (const std::system_error&) {
        const size_t started = workers_.size() + 1;
        end();
        throw std::runtime_error("only " + std::to_string(started) + " of " +
                                 std::to_string(threads) + " threads could be started");
    }
}

Pool::~Pool() { end(); }

void Pool::end() {
    ending_.store(true);
    job_.fetch_add(1);
    job_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::keep_to(const std::vector<int>& cores) {
#if defined(__linux__)
    for (size_t t = 1; t < cores.size() && t <= workers_.size(); ++t) {
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(cores[t], &own);
        // Refused where the core is gone by now: the worker then runs anywhere, as before.
        pthread_setaffinity_np(workers_[t - 1].native_handle(), sizeof own, &own);
    }
#endif
}

void Pool::share(int n) {
    for (int t = 0; t < threads_; ++t) {
        ranges_[t].stop = first(n, t + 1);
        ranges_[t].next.store(first(n, t), std::memory_order_relaxed);
    }
    gate_.store(OPEN, std::memory_order_release);
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();
    drain(0);
    // Nobody may enter any more; who is inside still reads the task.
    gate_.fetch_and(~OPEN, std::memory_order_acq_rel);
    uint32_t inside;
    for (int spins = 0; (inside = gate_.load(std::memory_order_acquire)) != 0; ++spins) {
        // Longer than tasks take: another process has that worker's core. It gets this one.
        if (spins < FEW_TASKS) pause();
        else gate_.wait(inside, std::memory_order_acquire);
    }
    if (failed_) std::rethrow_exception(std::exchange(failed_, nullptr));
}

void Pool::drain(int thread) {
    for (int other = 0; other < threads_; ++other) {
        Range& range = ranges_[(thread + other) % threads_];
        while (true) {
            const int i = range.next.fetch_add(1, std::memory_order_relaxed);
            if (i >= range.stop) break;
            try {
                inside_ = true;
                call_(task_, i);
            } catch (...) {
                const std::lock_guard<std::mutex> hold(failing_);
                if (!failed_) failed_ = std::current_exception();
            }
            inside_ = false;
        }
    }
}

void Pool::work(int thread) {
    int seen = 0;
    while (true) {
        const auto since = std::chrono::steady_clock::now();
        for (int spins = 0; job_.load(std::memory_order_acquire) == seen; ++spins) {
            pause();
            if (spins % 64 != 63) continue;
            const bool in_run = runs_.load(std::memory_order_relaxed) > 0;
            if (std::chrono::steady_clock::now() - since > (in_run ? PATIENCE_IN_RUN : PATIENCE))
                job_.wait(seen, std::memory_order_acquire);
        }
        seen = job_.load(std::memory_order_acquire);
        if (ending_.load()) return;
        uint32_t gate = gate_.load(std::memory_order_acquire);
        while ((gate & OPEN) && !gate_.compare_exchange_weak(gate, gate + 1)) {
        }
        if (!(gate & OPEN)) continue;
        drain(thread);
        if (gate_.fetch_sub(1, std::memory_order_acq_rel) == 1) gate_.notify_one();
    }
}

namespace {

std::unique_ptr<Pool>& current() {
    static std::unique_ptr<Pool> one = std::make_unique<Pool>(1);
    return one;
}

}  // namespace

Pool& pool() { return *current(); }

void use_threads(int threads) {
    if (threads != pool().threads()) current() = std::make_unique<Pool>(threads);
}

}  // namespace longspan
