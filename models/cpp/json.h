// JSON as the headers of safetensors files and the metadata of a package use it: texts, whole numbers, lists and maps.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

struct Json {
  enum class Kind { number, text, list, map };
  Kind kind = Kind::number;
  int64_t number = 0;
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> map;

  static Json parse(std::string_view source);

  int64_t as_number() const { return must(Kind::number, "a whole number"), number; }
  const std::string& as_text() const { return must(Kind::text, "a text"), text; }
  const std::vector<Json>& as_list() const { return must(Kind::list, "a list"), list; }
  const std::map<std::string, Json>& as_map() const { return must(Kind::map, "a map"), map; }

  const Json& operator[](const std::string& key) const {
    const auto found = as_map().find(key);
    if (found == map.end()) throw std::runtime_error("there is no \"" + key + "\"");
    return found->second;
  }
  std::vector<int64_t> numbers() const {
    std::vector<int64_t> all;
    for (const Json& part : as_list()) all.push_back(part.as_number());
    return all;
  }
  std::vector<std::string> texts() const {
    std::vector<std::string> all;
    for (const Json& part : as_list()) all.push_back(part.as_text());
    return all;
  }

 private:
  void must(Kind wanted, const char* what) const {
    if (kind != wanted) throw std::runtime_error(std::string("expected ") + what);
  }
};

class JsonReader {
 public:
  explicit JsonReader(std::string_view source) : rest(source) {}

  Json all() {
    Json found = value(0);
    if (skip_spaces(), !rest.empty()) fail("the end");
    return found;
  }

 private:
  std::string_view rest;

  [[noreturn]] void fail(const char* expected) const {
    const std::string found = rest.empty() ? "the end" : "'" + std::string(rest.substr(0, 20)) + "'";
    throw std::runtime_error(std::string("expected ") + expected + ", found " + found);
  }
  void skip_spaces() {
    while (!rest.empty() && std::string_view(" \t\r\n").find(rest[0]) != rest.npos) rest.remove_prefix(1);
  }
  bool take(char c) {
    skip_spaces();
    const bool there = !rest.empty() && rest[0] == c;
    if (there) rest.remove_prefix(1);
    return there;
  }
  char next() {
    if (rest.empty()) fail("more of a text");
    const char c = rest[0];
    rest.remove_prefix(1);
    return c;
  }

  Json value(int depth) {
    if (depth > 20) fail("less nesting");
    Json found;
    if (take('{')) {
      found.kind = Json::Kind::map;
      if (take('}')) return found;
      do {
        if (!take('"')) fail("a text in quotes");
        std::string key = text();
        if (!take(':')) fail("':'");
        if (!found.map.emplace(key, value(depth + 1)).second) {
          throw std::runtime_error("\"" + key + "\" is there twice");
        }
      } while (take(','));
      if (!take('}')) fail("'}'");
    } else if (take('[')) {
      found.kind = Json::Kind::list;
      if (take(']')) return found;
      do found.list.push_back(value(depth + 1));
      while (take(','));
      if (!take(']')) fail("']'");
    } else if (take('"')) {
      found.kind = Json::Kind::text;
      found.text = text();
    } else {
      found.number = number();
    }
    return found;
  }

  int64_t number() {
    const bool negative = take('-');
    size_t digits = 0;
    int64_t found = 0;
    for (; digits < rest.size() && rest[digits] >= '0' && rest[digits] <= '9'; ++digits) {
      if (digits == 18) fail("a number of at most 18 digits");
      found = 10 * found + (rest[digits] - '0');
    }
    if (digits == 0) fail("a text, a whole number, a list or a map");
    rest.remove_prefix(digits);
    return negative ? -found : found;
  }

  std::string text() {  // behind its first quote
    std::string found;
    for (char c = next(); c != '"'; c = next()) {
      if (c != '\\') {
        found += c;
        continue;
      }
      switch (c = next()) {
        case 'b': found += '\b'; break;
        case 'f': found += '\f'; break;
        case 'n': found += '\n'; break;
        case 'r': found += '\r'; break;
        case 't': found += '\t'; break;
        case 'u': add_utf8(found, four_digits()); break;
        default: found += c;  // a quote or a backslash
      }
    }
    return found;
  }
  unsigned four_digits() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i) {
      const size_t digit = std::string_view("0123456789abcdef").find(static_cast<char>(next() | 0x20));
      if (digit == std::string_view::npos) fail("four digits of base 16 after \\u");
      code = 16 * code + static_cast<unsigned>(digit);
    }
    return code;
  }
  void add_utf8(std::string& out, unsigned code) {
    if (code >= 0xD800 && code < 0xDC00) {  // the first half of a pair
      if (next() != '\\' || next() != 'u') fail("the second half of a character");
      code = 0x10000 + ((code - 0xD800) << 10) + (four_digits() - 0xDC00);
      out += static_cast<char>(0xF0 | code >> 18);
      out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
      out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    } else if (code >= 0x800) {
      out += static_cast<char>(0xE0 | code >> 12);
      out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    } else if (code >= 0x80) {
      out += static_cast<char>(0xC0 | code >> 6);
    } else {
      out += static_cast<char>(code);
      return;
    }
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
};

inline Json Json::parse(std::string_view source) { return JsonReader(source).all(); }
