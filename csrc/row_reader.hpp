// Rows of tokens: each is read from its file, checked and widened to 64 bits in one pass.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "file_reader.hpp"

namespace mer {

// Token `id` at `position` of request `row` is no id of the vocabulary.
struct TokenOutside : std::runtime_error {
    TokenOutside(i64 row, i64 position, i64 id)
        : std::runtime_error("token id outside of the vocabulary"),
          row(row),
          position(position),
          id(id) {}
    std::array<i64, 3> values() const { return {row, position, id}; }
    i64 row, position, id;
};

// Requests, one element a row.
struct RowRequests {
    i64 count;
    const std::int32_t* descriptor;
    const i64* byte;           // of the row's first token
    const std::uint8_t* code;  // dtype code of the .idx file
    const i64* place;          // row of the output
};

class RowReader {
  public:
    RowReader(i64 length, i64 vocab_size) : length_(length), vocab_size_(vocab_size) {
        if (length < 1 || vocab_size < 1) {
            throw std::invalid_argument("rows of " + std::to_string(length) + " tokens out of " +
                                        std::to_string(vocab_size) + " must both be at least 1");
        }
        buffer_.resize(static_cast<std::size_t>(length));
    }

    // Fills the rows of `out`, shape (num_rows, length).
    void read(const RowRequests& rows, i64* out, i64 num_rows) {
        for (i64 row = 0; row < rows.count; ++row) {
            const i64 place = rows.place[row];
            if (place < 0 || place >= num_rows) {
                throw std::invalid_argument("place " + std::to_string(place) + " of " +
                                            std::to_string(num_rows) + " rows");
            }
            read_row(rows, row, out + place * length_);
        }
    }

  private:
    void read_row(const RowRequests& rows, i64 row, i64* out) {
        switch (rows.code[row]) {
            case 1:
                return read_as<std::uint8_t>(rows, row, out);
            case 2:
                return read_as<std::int8_t>(rows, row, out);
            case 3:
                return read_as<std::int16_t>(rows, row, out);
            case 4:
                return read_as<std::int32_t>(rows, row, out);
            case 5:
                return read_as<std::int64_t>(rows, row, out);
            case 8:
                return read_as<std::uint16_t>(rows, row, out);
            default:
                throw std::invalid_argument("dtype code " + std::to_string(rows.code[row]));
        }
    }

    template <class Token>
    void read_as(const RowRequests& rows, i64 row, i64* out) {
        Token* tokens = reinterpret_cast<Token*>(buffer_.data());
        const i64 size = length_ * static_cast<i64>(sizeof(Token));
        read_exactly(rows.descriptor[row], tokens, size, rows.byte[row], row);
        // As unsigned numbers negative ids are large ones: one comparison finds both.
        using Unsigned = std::make_unsigned_t<Token>;
        const i64 limit = std::min<i64>(vocab_size_ - 1, std::numeric_limits<Token>::max());
        const Unsigned last = static_cast<Unsigned>(limit);
        Unsigned outside = 0;
        for (i64 i = 0; i < length_; ++i) {
            outside |= static_cast<Unsigned>(static_cast<Unsigned>(tokens[i]) > last);
        }
        for (i64 i = 0; i < length_; ++i) out[i] = tokens[i];
        if (outside == 0) return;
        const auto is_outside = [last](Token id) { return static_cast<Unsigned>(id) > last; };
        const Token* found = std::find_if(tokens, tokens + length_, is_outside);
        throw TokenOutside(row, found - tokens, *found);
    }

    i64 length_;
    i64 vocab_size_;
    std::vector<i64> buffer_;  // of 64-bit words, so that it is aligned for every dtype
};

}  // namespace mer
