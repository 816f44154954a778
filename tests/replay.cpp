// Runs a recorded program of native kernels on the memory that came with it: `replay IMAGE RESULT LEVEL THREADS`. Linked
// with the kernels and, where they are another machine's, run by its emulator; tests/emulate.py writes the image and
// judges the result. Knows no kernel.
//
// The image: how many words, regions and places there are; the words; each region's bytes; each place (a word, and the
// region and offset that it points to); then the regions. All numbers are 64 bits. The result: the regions, afterwards.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

extern "C" {
int daedal_use(const char* wanted);
void daedal_run(const int64_t* program, int64_t words, int threads);
}

namespace {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Region = std::unique_ptr<uint8_t, Free>;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "replay: %s\n", what);
    std::exit(1);
}

void read(std::FILE* file, void* to, int64_t bytes) {
    if (std::fread(to, 1, bytes, file) != static_cast<size_t>(bytes)) fail("the image ends too early");
}

std::vector<int64_t> numbers(std::FILE* file, int64_t count) {
    std::vector<int64_t> values(count);
    read(file, values.data(), count * sizeof(int64_t));
    return values;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 5) fail("takes IMAGE RESULT LEVEL THREADS");
    std::FILE* image = std::fopen(arguments[1], "rb");
    if (image == nullptr) fail("the image cannot be opened");
    const std::vector<int64_t> counts = numbers(image, 3);
    std::vector<int64_t> words = numbers(image, counts[0]);
    const std::vector<int64_t> sizes = numbers(image, counts[1]), places = numbers(image, 3 * counts[2]);
    std::vector<Region> regions;
    for (const int64_t size : sizes) {
        regions.emplace_back(static_cast<uint8_t*>(std::aligned_alloc(64, (size + 127) / 64 * 64)));
        read(image, regions.back().get(), size);
    }
    std::fclose(image);
    for (size_t i = 0; i < places.size(); i += 3)
        words[places[i]] = reinterpret_cast<int64_t>(regions[places[i + 1]].get() + places[i + 2]);
    if (daedal_use(arguments[3]) != 0) fail("this machine has no such level");
    daedal_run(words.data(), static_cast<int64_t>(words.size()), std::atoi(arguments[4]));
    std::FILE* result = std::fopen(arguments[2], "wb");
    if (result == nullptr) fail("the result cannot be written");
    for (size_t i = 0; i < sizes.size(); ++i)
        if (std::fwrite(regions[i].get(), 1, sizes[i], result) != static_cast<size_t>(sizes[i])) fail("no room");
    if (std::fclose(result) != 0) fail("no room");
}
