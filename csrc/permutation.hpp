// A keyed permutation of [0, size) in O(1) memory: a generalised Feistel network with cycle walking
// (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "hash.hpp"

namespace mer {

constexpr u64 kMaxSize = 1ULL << 62;

// Writes x as left * columns + right and adds, in turn, a hash of one half to the other half modulo
// that half's size. A number outside [0, size) is sent round again, which ends because the network
// permutes [0, rows * columns).
//
// `rows` is even: adding one to the left half for a single value of the right half is then an odd
// permutation, so that small domains reach odd permutations as often as even ones.
//
// Rounds: on a 2 x 2 domain the distance from the uniform distribution over all permutations halves
// with each round (exact computation with ideal round functions), so small sizes take 24 rounds,
// 6e-8 there. What two positions still know of each other shrinks by the side of the domain every
// two rounds, and from 4096 on (sides of 64) 8 rounds leave less than 1e-7.
class Permutation {
  public:
    explicit Permutation(u64 size) : size_(size) {
        if (size < 1 || size > kMaxSize) {
            throw std::invalid_argument("a permutation needs a size from 1 to 2^62, not " +
                                        std::to_string(size));
        }
        rows_ = ceil_sqrt(size);
        rows_ += rows_ & 1;
        columns_ = (size + rows_ - 1) / rows_;
        rounds_ = size < 4096 ? 24 : 8;
    }

    u64 size() const { return size_; }

    u64 forward(u64 key, u64 index) const {
        check(index);
        if (size_ == 1) return 0;
        do index = encrypt(key, index);
        while (index >= size_);
        return index;
    }

    u64 inverse(u64 key, u64 image) const {
        check(image);
        if (size_ == 1) return 0;
        do image = decrypt(key, image);
        while (image >= size_);
        return image;
    }

  private:
    static u64 ceil_sqrt(u64 n) {
        u64 root = static_cast<u64>(std::sqrt(static_cast<double>(n)));
        while (root * root >= n) --root;  // sqrt of a rounded double may be off either way
        while (root * root < n) ++root;
        return root;
    }

    void check(u64 index) const {
        if (index >= size_) {
            throw std::invalid_argument("index " + std::to_string(index) +
                                        " is outside of a permutation of size " +
                                        std::to_string(size_));
        }
    }

    static u64 shift(u64 key, u64 round, u64 half, u64 modulus) {
        return scale_to(mix64((key + round * kGolden) ^ half), modulus);
    }

    u64 encrypt(u64 key, u64 x) const {
        u64 left = x / columns_, right = x % columns_;
        for (u64 round = 0; round < rounds_; round += 2) {
            left += shift(key, round, right, rows_);
            if (left >= rows_) left -= rows_;
            right += shift(key, round + 1, left, columns_);
            if (right >= columns_) right -= columns_;
        }
        return left * columns_ + right;
    }

    u64 decrypt(u64 key, u64 x) const {
        u64 left = x / columns_, right = x % columns_;
        for (u64 round = rounds_; round > 0; round -= 2) {
            right += columns_ - shift(key, round - 1, left, columns_);
            if (right >= columns_) right -= columns_;
            left += rows_ - shift(key, round - 2, right, rows_);
            if (left >= rows_) left -= rows_;
        }
        return left * columns_ + right;
    }

    u64 size_, rows_, columns_, rounds_;
};

}  // namespace mer
