// Reading a piece of a file: whole, or an error with the numbers that say where it ended.
#pragma once

#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <stdexcept>

#include "hash.hpp"

namespace mer {

// The file of request `row` ends at `byte`, `missing` bytes too early.
struct ReadEnded : std::runtime_error {
    ReadEnded(i64 row, i64 byte, i64 missing)
        : std::runtime_error("the file ends"), row(row), byte(byte), missing(missing) {}
    std::array<i64, 3> values() const { return {row, byte, missing}; }
    i64 row, byte, missing;
};

// Reading at `byte` for request `row` failed with the system's error number.
struct ReadFailed : std::runtime_error {
    ReadFailed(i64 row, i64 byte, int error)
        : std::runtime_error("reading failed"), row(row), byte(byte), error(error) {}
    std::array<i64, 3> values() const { return {row, byte, error}; }
    i64 row, byte, error;
};

// Reads exactly `size` bytes from `byte` on. `row` is the number of the request, for the errors.
// pread has no position of its own, so threads may share a descriptor.
inline void read_exactly(int descriptor, void* buffer, i64 size, i64 byte, i64 row) {
    i64 done = 0;
    while (done < size) {
        const ssize_t count = ::pread(descriptor, static_cast<char*>(buffer) + done,
                                      static_cast<std::size_t>(size - done), byte + done);
        if (count == 0) throw ReadEnded(row, byte + done, size - done);
        if (count < 0 && errno != EINTR) throw ReadFailed(row, byte + done, errno);
        if (count > 0) done += count;
    }
}

}  // namespace mer
