// Files of tensors: 8 bytes with the length of a header, the header (JSON: of each tensor its dtype, its shape, and
// where its bytes begin and end), and the bytes. https://huggingface.co/docs/safetensors
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "json.h"

namespace safetensors {

using Tensors = std::map<std::string, at::Tensor>;

inline const std::pair<const char*, at::ScalarType> DTYPES[] = {
    {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},  {"BF16", at::kBFloat16},
    {"I64", at::kLong},   {"I32", at::kInt},   {"BOOL", at::kBool}, {"U8", at::kByte}};

inline at::ScalarType dtype_of(const std::string& name) {
  for (const auto& [known, dtype] : DTYPES) {
    if (name == known) return dtype;
  }
  throw std::runtime_error("its dtype is " + name + ", which is not read here");
}

inline const char* name_of(at::ScalarType dtype) {
  for (const auto& [name, known] : DTYPES) {
    if (dtype == known) return name;
  }
  throw std::runtime_error(std::string("its dtype is ") + at::toString(dtype) + ", which is not written here");
}

// The bytes that a tensor takes; refuses shapes of which there can be none.
inline int64_t size_of(const std::vector<int64_t>& shape, at::ScalarType dtype) {
  int64_t size = static_cast<int64_t>(at::elementSize(dtype));
  for (const int64_t length : shape) {
    if (length < 0 || __builtin_mul_overflow(size, length, &size)) throw std::runtime_error("its shape is impossible");
  }
  return size;
}

// Run `what`; an error of it begins with `where`.
template <class What>
auto at_place(const std::string& where, What what) {
  try {
    return what();
  } catch (const std::exception& error) {
    throw std::runtime_error(where + ": " + error.what());
  }
}

inline Tensors load(const std::filesystem::path& path) {
  return at_place("cannot read " + path.string(), [&] {
    std::ifstream file(path, std::ios::binary);
    if (!file || std::filesystem::is_directory(path)) throw std::runtime_error("there is no such file to be read");
    const int64_t whole = static_cast<int64_t>(std::filesystem::file_size(path));
    int64_t length = 0;  // both in the order of bytes of x86 and ARM, lowest first
    file.read(reinterpret_cast<char*>(&length), sizeof length);
    if (!file || length < 2 || length > whole - 8) throw std::runtime_error("it is no whole safetensors file");
    std::string header(static_cast<size_t>(length), ' ');
    file.read(header.data(), length);
    const Json described = at_place("its header", [&] { return Json::parse(header); });

    Tensors tensors;
    int64_t total = 0;
    for (const auto& [name, entry] : described.as_map()) {
      if (name == "__metadata__") continue;
      at_place("tensor " + name, [&, &name = name, &entry = entry] {
        const at::ScalarType dtype = dtype_of(entry["dtype"].as_text());
        const std::vector<int64_t> shape = entry["shape"].numbers(), offsets = entry["data_offsets"].numbers();
        const int64_t size = size_of(shape, dtype);
        if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] > whole - 8 - length ||
            offsets[1] - offsets[0] != size) {
          throw std::runtime_error("its bytes do not fit its shape, or the file: the file is damaged");
        }
        at::Tensor tensor = at::empty(shape, dtype);
        file.seekg(8 + length + offsets[0]);
        file.read(static_cast<char*>(tensor.data_ptr()), size);
        if (!file) throw std::runtime_error("its bytes cannot be read");
        tensors[name] = tensor;
        total += size;
      });
    }
    if (8 + length + total != whole) throw std::runtime_error("it has more or fewer bytes than its tensors");
    return tensors;
  });
}

inline std::string quoted(const std::string& name) {
  std::string out = "\"";
  for (const char c : name) {
    char code[8];
    if (static_cast<unsigned char>(c) < 0x20) {
      std::snprintf(code, sizeof code, "\\u%04x", c);
      out += code;
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + '"';
}

// Write a file, which gets its name when it is whole.
inline void save(const std::filesystem::path& path, const Tensors& tensors) {
  at_place("cannot write " + path.string(), [&] {
    std::vector<std::pair<std::string, at::Tensor>> sorted;
    for (const auto& [name, tensor] : tensors) sorted.emplace_back(name, tensor.detach().cpu().contiguous());
    std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
      return a.second.element_size() > b.second.element_size();  // so that each begins at a multiple of its size
    });

    std::string header = "{";
    size_t offset = 0;
    for (const auto& [name, tensor] : sorted) {
      const std::string begin = std::to_string(offset), end = std::to_string(offset += tensor.nbytes());
      std::string shape;
      for (const int64_t n : tensor.sizes()) shape += (shape.empty() ? "" : ",") + std::to_string(n);
      header += (header.size() > 1 ? "," : "") + quoted(name) + ":{\"dtype\":\"" + name_of(tensor.scalar_type()) +
                "\",\"shape\":[" + shape + "],\"data_offsets\":[" + begin + "," + end + "]}";
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');

    const std::filesystem::path draft = path.string() + ".part";
    {
      std::ofstream file(draft, std::ios::binary);
      const int64_t length = static_cast<int64_t>(header.size());
      file.write(reinterpret_cast<const char*>(&length), sizeof length) << header;
      for (const auto& [name, tensor] : sorted) {
        file.write(static_cast<const char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
      }
      if (!file.flush()) throw std::runtime_error("no directory, no permission, or no space left");
    }
    std::filesystem::rename(draft, path);
  });
}

}  // namespace safetensors
