// A C ABI over oneCCL's C++ API, for knl/comm/oneccl.py. A call that fails returns null or -1 and
// leaves its reason in knl_ccl_error().

#include <oneapi/ccl.hpp>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <thread>

#define KNL_API extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string last_error;

template <typename Result, typename Body>
Result guarded(Result failed, Body body) {
    try {
        return body();
    } catch (const std::exception& error) {
        last_error = error.what();
        return failed;
    }
}

struct Communicator {
    ccl::shared_ptr_class<ccl::kvs> kvs;  // must outlive the communicator
    ccl::communicator ranks;
};

// The last one that this process made, to be the first rank of a communicator.
ccl::shared_ptr_class<ccl::kvs> main_kvs;

}  // namespace

KNL_API const char* knl_ccl_error() { return last_error.c_str(); }

// Called first: oneCCL reads its environment here.
KNL_API int knl_ccl_version(char* text, size_t size) {
    return guarded(-1, [&] {
        ccl::init();
        std::strncpy(text, ccl::get_library_version().full, size - 1);
        text[size - 1] = '\0';
        return 0;
    });
}

// Makes the key-value store at which the ranks meet; `address` takes its 256 bytes.
KNL_API int knl_ccl_address(uint8_t* address, size_t size) {
    return guarded(-1, [&] {
        main_kvs = ccl::create_main_kvs();
        const ccl::kvs::address_type bytes = main_kvs->get_address();
        if (size < bytes.size()) throw std::length_error("address buffer is too small");
        std::memcpy(address, bytes.data(), bytes.size());
        return 0;
    });
}

// Rank 0 is the one that made the address.
KNL_API Communicator* knl_ccl_open(int size, int rank, const uint8_t* address) {
    return guarded<Communicator*>(nullptr, [&] {
        ccl::shared_ptr_class<ccl::kvs> kvs = main_kvs;
        if (rank != 0) {
            ccl::kvs::address_type bytes;
            std::memcpy(bytes.data(), address, bytes.size());
            kvs = ccl::create_kvs(bytes);
        }
        return new Communicator{kvs, ccl::create_communicator(size, rank, kvs)};
    });
}

KNL_API void knl_ccl_close(Communicator* comm) { delete comm; }

// Sums `count` elements over the ranks in place. `datatype` is ccl::datatype's own number; a higher
// `priority` goes first where CCL_PRIORITY=direct.
KNL_API ccl::event* knl_ccl_allreduce(Communicator* comm, void* data, size_t count, int datatype,
                                      size_t priority) {
    return guarded<ccl::event*>(nullptr, [&] {
        auto attributes = ccl::create_operation_attr<ccl::allreduce_attr>();
        if (priority > 0) attributes.set<ccl::operation_attr_id::priority>(priority);
        return new ccl::event(ccl::allreduce(data, data, count,
                                             static_cast<ccl::datatype>(datatype),
                                             ccl::reduction::sum, comm->ranks, attributes));
    });
}

// Seconds of one allreduce as a C++ program would call it, for knl bench allreduce: what the way
// through Python adds is the difference. Negative when it failed.
KNL_API double knl_ccl_time_allreduce(Communicator* comm, void* data, size_t count, int datatype) {
    using clock = std::chrono::steady_clock;
    return guarded(-1.0, [&] {
        const clock::time_point start = clock::now();
        ccl::allreduce(data, data, count, static_cast<ccl::datatype>(datatype),
                       ccl::reduction::sum, comm->ranks)
            .wait();
        return std::chrono::duration<double>(clock::now() - start).count();
    });
}

KNL_API ccl::event* knl_ccl_broadcast(Communicator* comm, void* data, size_t count, int datatype,
                                      int root) {
    return guarded<ccl::event*>(nullptr, [&] {
        return new ccl::event(ccl::broadcast(data, count, static_cast<ccl::datatype>(datatype),
                                             root, comm->ranks));
    });
}

KNL_API ccl::event* knl_ccl_barrier(Communicator* comm) {
    return guarded<ccl::event*>(nullptr,
                                [&] { return new ccl::event(ccl::barrier(comm->ranks)); });
}

// 1 done, 0 not yet, -1 failed.
KNL_API int knl_ccl_test(ccl::event* event) {
    return guarded(-1, [&] { return event->test() ? 1 : 0; });
}

// Waits at most `seconds`: 1 done, 0 not done in time, -1 failed. Asks instead of blocking in
// oneCCL, which knows no time limit; gives the core away now and then once it has asked for a
// millisecond, as ranks may have to share it. Each question moves data on where there are no
// workers, so a clock or a system call between any two of them would slow the sum down.
KNL_API int knl_ccl_wait(ccl::event* event, double seconds) {
    using clock = std::chrono::steady_clock;
    return guarded(-1, [&] {
        const clock::time_point start = clock::now();
        for (;;) {
            for (int question = 0; question < 32; ++question)
                if (event->test()) return 1;
            const std::chrono::duration<double> waited = clock::now() - start;
            if (waited.count() > seconds) return 0;
            if (waited.count() > 1e-3) std::this_thread::yield();
        }
    });
}

KNL_API void knl_ccl_release(ccl::event* event) { delete event; }
