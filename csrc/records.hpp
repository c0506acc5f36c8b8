// Records of fixed size in shared files: a header, tokens, and bits that mark the ends of
// documents.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "file_reader.hpp"
#include "row_reader.hpp"

namespace mer {

// Writing at `byte` for request `row` failed with the system's error number.
struct WriteFailed : std::runtime_error {
    WriteFailed(i64 row, i64 byte, int error)
        : std::runtime_error("writing failed"), row(row), byte(byte), error(error) {}
    std::array<i64, 3> values() const { return {row, byte, error}; }
    i64 row, byte, error;
};

// Writes exactly `size` bytes from `byte` on, for request `row`.
inline void write_exactly(int descriptor, const void* buffer, i64 size, i64 byte, i64 row) {
    i64 done = 0;
    while (done < size) {
        const ssize_t count = ::pwrite(descriptor, static_cast<const char*>(buffer) + done,
                                       static_cast<std::size_t>(size - done), byte + done);
        if (count == 0) throw WriteFailed(row, byte + done, EIO);
        if (count < 0 && errno != EINTR) throw WriteFailed(row, byte + done, errno);
        if (count > 0) done += count;
    }
}

// What stands before a record's tokens, little endian. Each checksum covers the record up to where
// it lies; `checksum` also covers all that follows it.
struct RecordHeader {
    std::uint32_t magic;
    std::uint16_t version;
    std::uint8_t token_bytes;
    std::uint8_t with_ends;
    std::uint32_t seq_length;
    std::uint32_t num_ends;
    u64 key;
    i64 identity[3];
    u64 header_checksum;
    u64 checksum;
};
static_assert(sizeof(RecordHeader) == 64);

constexpr std::uint32_t kRecordMagic = 0x5245'4D52;  // "RMER"
constexpr std::uint32_t kErasedMagic = 0x5341'5245;  // "ERAS"
constexpr std::uint16_t kRecordVersion = 1;

// A field of request `row`'s header is not what it must be; `byte` is the field's place there.
struct RecordFault : std::runtime_error {
    RecordFault(i64 row, i64 byte, u64 found, u64 expected, const RecordHeader& header)
        : std::runtime_error("no such record"),
          all{row,
              byte,
              static_cast<i64>(found),
              static_cast<i64>(expected),
              header.identity[0],
              header.identity[1],
              header.identity[2]} {}
    std::array<i64, 7> values() const { return all; }
    std::array<i64, 7> all;
};

// The multilinear hash of Lemire & Kaser ("Strongly universal string hashing is fast", 2014): the
// sum of all 32-bit words, each times a 64-bit constant of its place, modulo 2^64. The constants
// are odd, so every single wrong bit is found; that two different contents agree has a chance of
// 2^-32 at most. With words of 64 bits the same bit could be wrong in two of them and not be found.
class Multilinear {
  public:
    explicit Multilinear(i64 bytes) {
        for (i64 place = 1; place <= bytes / 4; ++place) {
            const u64 constant = mix64(static_cast<u64>(place) * kGolden) | 1;
            low_.push_back(static_cast<std::uint32_t>(constant));
            high_.push_back(static_cast<std::uint32_t>(constant >> 32));
        }
    }

    // Of the bytes [first, stop), multiples of 4, of what `bytes` points to. Products of 32-bit
    // numbers are what every vector unit has.
    u64 sum(const unsigned char* bytes, i64 first, i64 stop) const {
        const std::uint32_t *low = low_.data(), *high = high_.data();
        u64 low_sum = 0, high_sum = 0;
        for (i64 i = first / 4; i < stop / 4; ++i) {
            std::uint32_t word;
            std::memcpy(&word, bytes + 4 * i, 4);
            low_sum += static_cast<u64>(low[i]) * word;
            high_sum += static_cast<u64>(high[i]) * word;
        }
        return low_sum + (high_sum << 32);
    }

  private:
    std::vector<std::uint32_t> low_, high_;  // halves of the constants
};

// Requests, one element a record.
struct RecordRequests {
    i64 count;
    const std::int32_t* descriptor;
    const i64* byte;   // of the record in its file
    const i64* place;  // row of the arrays that are read or filled
};

// Methods may be called from several threads together.
class Records {
  public:
    Records(i64 seq_length, i64 vocab_size, bool with_ends, u64 key)
        : seq_length_(seq_length),
          vocab_size_(vocab_size),
          key_(key),
          with_ends_(with_ends),
          token_bytes_(vocab_size <= i64{1} << 16 ? 2 : 4),
          hash_(0) {
        if (seq_length < 1 || seq_length > i64{1} << 31 || vocab_size < 1 ||
            vocab_size > i64{1} << 32) {
            throw std::invalid_argument("records of " + std::to_string(seq_length) +
                                        " inputs out of " + std::to_string(vocab_size) +
                                        " ids; both must be at least 1 and fit into 32 bits");
        }
        hash_ = Multilinear(record_bytes());
    }

    i64 num_tokens() const { return seq_length_ + 1; }
    i64 end_bytes() const { return with_ends_ ? (seq_length_ + 7) / 8 : 0; }
    i64 record_bytes() const { return (ends_at() + end_bytes() + 63) / 64 * 64; }

    // Rows of `identity`: 3 numbers; of `tokens`: S + 1; of `ends`: end_bytes(), the lowest bit
    // first; `num_ends`: how many of the bits are set.
    void write(const RecordRequests& rows, const i64* identity, const i64* tokens,
               const std::uint8_t* ends, const i64* num_ends) const {
        Buffer record(static_cast<std::size_t>(record_bytes()));
        for (i64 row = 0; row < rows.count; ++row) {
            const i64 place = rows.place[row];
            narrow(tokens + place * num_tokens(), record.data() + sizeof(RecordHeader), row);
            std::copy_n(ends + place * end_bytes(), end_bytes(), record.data() + ends_at());
            seal(identity + place * 3, num_ends[place], record.data());
            write_exactly(rows.descriptor[row], record.data(), record_bytes(), rows.byte[row], row);
        }
    }

    // Fills rows of `tokens` and `ends`; each record must have the given identity.
    void read(const RecordRequests& rows, const i64* identity, i64* tokens,
              std::uint8_t* ends) const {
        Buffer record(static_cast<std::size_t>(record_bytes()));
        for (i64 row = 0; row < rows.count; ++row) {
            const i64 place = rows.place[row];
            fetch_row(rows, row, identity + place * 3, record.data());
            widen(record.data() + sizeof(RecordHeader), tokens + place * num_tokens(), row);
            std::copy_n(record.data() + ends_at(), end_bytes(), ends + place * end_bytes());
        }
    }

    // Fills rows of `counts` with the number of end bits. Reads the headers alone.
    void count_ends(const RecordRequests& rows, const i64* identity, i64* counts) const {
        RecordHeader header;
        for (i64 row = 0; row < rows.count; ++row) {
            const i64 place = rows.place[row];
            read_exactly(rows.descriptor[row], &header, sizeof header, rows.byte[row], row);
            check_header(header, identity + place * 3, row);
            counts[place] = header.num_ends;
        }
    }

    // Fills rows of `records`, record_bytes() each, with whole records of any identity.
    void fetch(const RecordRequests& rows, unsigned char* records) const {
        for (i64 row = 0; row < rows.count; ++row) {
            fetch_row(rows, row, nullptr, records + rows.place[row] * record_bytes());
        }
    }

    // Writes rows of `records` as they are.
    void store(const RecordRequests& rows, const unsigned char* records) const {
        for (i64 row = 0; row < rows.count; ++row) {
            write_exactly(rows.descriptor[row], records + rows.place[row] * record_bytes(),
                          record_bytes(), rows.byte[row], row);
        }
    }

    // A record that says that it was erased: all but the magic are zeros.
    std::vector<unsigned char> erased() const {
        Buffer record(static_cast<std::size_t>(record_bytes()));
        std::memcpy(record.data(), &kErasedMagic, sizeof kErasedMagic);
        return record;
    }

  private:
    using Buffer = std::vector<unsigned char>;
    static constexpr i64 kHeaderSum = offsetof(RecordHeader, header_checksum);
    static constexpr i64 kSum = offsetof(RecordHeader, checksum);

    i64 ends_at() const {
        return static_cast<i64>(sizeof(RecordHeader)) + num_tokens() * token_bytes_;
    }

    static u64 header_checksum(const RecordHeader& header, const Multilinear& hash) {
        unsigned char bytes[sizeof header];
        std::memcpy(bytes, &header, sizeof header);
        return kGolden + hash.sum(bytes, 0, kHeaderSum);
    }

    u64 checksum(const unsigned char* record) const {
        return kGolden + hash_.sum(record, 0, kSum) +
               hash_.sum(record, sizeof(RecordHeader), record_bytes());
    }

    // Puts the header before tokens and bits.
    void seal(const i64* identity, i64 num_ends, unsigned char* record) const {
        RecordHeader header{kRecordMagic,
                            kRecordVersion,
                            static_cast<std::uint8_t>(token_bytes_),
                            with_ends_,
                            static_cast<std::uint32_t>(seq_length_),
                            static_cast<std::uint32_t>(num_ends),
                            key_,
                            {identity[0], identity[1], identity[2]},
                            0,
                            0};
        header.header_checksum = header_checksum(header, hash_);
        std::memcpy(record, &header, sizeof header);
        header.checksum = checksum(record);
        std::memcpy(record, &header, sizeof header);
    }

    void fetch_row(const RecordRequests& rows, i64 row, const i64* identity,
                   unsigned char* record) const {
        read_exactly(rows.descriptor[row], record, record_bytes(), rows.byte[row], row);
        RecordHeader header;
        std::memcpy(&header, record, sizeof header);
        check_header(header, identity, row);
        const u64 content = checksum(record);
        if (header.checksum != content) {
            throw RecordFault(row, kSum, header.checksum, content, header);
        }
    }

    // The header's own checksum comes before its numbers: a wrong bit is no other run.
    void check_header(const RecordHeader& header, const i64* identity, i64 row) const {
        const auto check = [&](i64 byte, u64 found, u64 expected) {
            if (found != expected) throw RecordFault(row, byte, found, expected, header);
        };
        check(offsetof(RecordHeader, magic), header.magic, kRecordMagic);
        check(offsetof(RecordHeader, version), header.version, kRecordVersion);
        check(kHeaderSum, header.header_checksum, header_checksum(header, hash_));
        check(offsetof(RecordHeader, seq_length), header.seq_length, static_cast<u64>(seq_length_));
        check(offsetof(RecordHeader, token_bytes), header.token_bytes,
              static_cast<u64>(token_bytes_));
        check(offsetof(RecordHeader, with_ends), header.with_ends, with_ends_);
        check(offsetof(RecordHeader, key), header.key, key_);
        for (i64 i = 0; identity != nullptr && i < 3; ++i) {
            check(offsetof(RecordHeader, identity) + 8 * i, static_cast<u64>(header.identity[i]),
                  static_cast<u64>(identity[i]));
        }
    }

    void narrow(const i64* tokens, unsigned char* out, i64 row) const {
        const i64 count = num_tokens();
        const i64 largest = token_bytes_ == 2 ? narrow_as<std::uint16_t>(tokens, count, out)
                                              : narrow_as<std::uint32_t>(tokens, count, out);
        if (largest >= vocab_size_) throw_outside(tokens, row);
    }

    void widen(const unsigned char* tokens, i64* out, i64 row) const {
        const i64 count = num_tokens();
        const i64 largest = token_bytes_ == 2 ? widen_as<std::uint16_t>(tokens, count, out)
                                              : widen_as<std::uint32_t>(tokens, count, out);
        if (largest >= vocab_size_) throw_outside(out, row);
    }

    [[noreturn]] void throw_outside(const i64* tokens, i64 row) const {
        const auto is_outside = [this](i64 id) { return id < 0 || id >= vocab_size_; };
        const i64* found = std::find_if(tokens, tokens + num_tokens(), is_outside);
        throw TokenOutside(row, found - tokens, *found);
    }

    // Returns the largest token, or a larger number where one does not fit.
    template <class Token>
    static i64 narrow_as(const i64* tokens, i64 count, unsigned char* out) {
        i64 bits = 0;
        Token largest = 0;
        for (i64 i = 0; i < count; ++i) {
            const Token token = static_cast<Token>(tokens[i]);
            std::memcpy(out + i * sizeof token, &token, sizeof token);
            bits |= tokens[i];
            largest = std::max(largest, token);
        }
        const bool fit = static_cast<u64>(bits) <= std::numeric_limits<Token>::max();
        return fit ? largest : std::numeric_limits<i64>::max();
    }

    // Returns the largest token.
    template <class Token>
    static i64 widen_as(const unsigned char* tokens, i64 count, i64* out) {
        Token largest = 0;
        for (i64 i = 0; i < count; ++i) {
            Token token;
            std::memcpy(&token, tokens + i * sizeof token, sizeof token);
            largest = std::max(largest, token);
            out[i] = token;
        }
        return largest;
    }

    i64 seq_length_;
    i64 vocab_size_;
    u64 key_;
    bool with_ends_;
    i64 token_bytes_;
    Multilinear hash_;
};

}  // namespace mer
