// Random contents for shared memory before each block, dynamic and static, so that a kernel which reads what it has not
// written gives other bits every time.
#pragma once

#include <dlfcn.h>
#include <elf.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

namespace vtexport::emulator {

inline void poison(void* memory, size_t bytes, uint64_t seed) {
  uint64_t word = seed * 0x9E3779B97F4A7C15u + 1;
  for (size_t i = 0; i < bytes; i += sizeof word) {
    word ^= word << 13, word ^= word >> 7, word ^= word << 17;
    std::memcpy(static_cast<char*>(memory) + i, &word, bytes - i < sizeof word ? bytes - i : sizeof word);
  }
}

struct Span {
  char* begin;
  size_t bytes;
};

// The static arrays inside the functions of vtexport::cuda, of the library or program that this is part of: there
// __shared__ stands for `static`. They are found by name in its table of symbols, because templates' statics can be
// put into no section of their own.
inline std::vector<Span> static_shared() {
  static const char here = 0;
  Dl_info own;
  if (dladdr(&here, &own) == 0) std::abort();
  std::ifstream file(own.dli_fname, std::ios::binary);
  const std::vector<char> image{std::istreambuf_iterator<char>(file), {}};
  auto read = [&](auto& to, size_t offset) {
    if (offset + sizeof to > image.size()) std::abort();
    std::memcpy(&to, image.data() + offset, sizeof to);
  };
  Elf64_Ehdr header;
  read(header, 0);
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  for (size_t i = 0; i < sections.size(); ++i) read(sections[i], header.e_shoff + i * sizeof(Elf64_Shdr));
  std::vector<Span> found;
  for (const Elf64_Shdr& table : sections) {
    if (table.sh_type != SHT_SYMTAB) continue;
    for (size_t at = 0; at < table.sh_size; at += sizeof(Elf64_Sym)) {
      Elf64_Sym symbol;
      read(symbol, table.sh_offset + at);
      const char* name = image.data() + sections[table.sh_link].sh_offset + symbol.st_name;
      const bool writable = symbol.st_shndx < sections.size() && (sections[symbol.st_shndx].sh_flags & SHF_WRITE) != 0;
      if (ELF64_ST_TYPE(symbol.st_info) != STT_OBJECT || !writable || std::strncmp(name, "_ZZN8vtexport4cuda", 18) != 0) {
        continue;
      }
      found.push_back({static_cast<char*>(own.dli_fbase) + symbol.st_value, symbol.st_size});
    }
  }
  if (found.empty()) {
    std::fprintf(stderr, "no shared memory was found among the symbols of %s\n", own.dli_fname);
    std::abort();
  }
  return found;
}

inline void poison_static_shared(uint64_t seed) {
  static const std::vector<Span> spans = static_shared();
  for (const Span& span : spans) poison(span.begin, span.bytes, seed++);
}

}  // namespace vtexport::emulator
