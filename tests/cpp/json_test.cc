#include "io/json.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "based/error.h"
#include "io/text.h"
#include "temporary_folder.h"

namespace based::io {
namespace {

Json parse(const std::string& text) { return Json::parse(text, "file"); }

std::string nested(int depth) { return std::string(depth, '[') + std::string(depth, ']'); }

TEST(Json, ReadsEveryType) {
  const Json json = parse(R"({"b": [1, -2.5, true, null, "x\u00e9"], "a": {}})");
  ASSERT_TRUE(json.as_object());
  ASSERT_EQ(json.as_object()->size(), 2u);
  EXPECT_EQ((*json.as_object())[0].key, "a");
  const Json::Array& items = *(*json.as_object())[1].value.as_array();
  EXPECT_EQ(items[0].as_integer(), 1);
  EXPECT_EQ(items[1].as_number(), -2.5);
  EXPECT_EQ(*items[2].as_bool(), true);
  EXPECT_TRUE(items[3].is_null());
  EXPECT_EQ(*items[4].as_string(), "x\xc3\xa9");
}

TEST(Json, KeepsIntegersExact) {
  EXPECT_EQ(parse("9223372036854775807").as_integer(), std::numeric_limits<std::int64_t>::max());
  EXPECT_EQ(parse("-9223372036854775808").as_integer(), std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(parse("9007199254740993").as_integer(), 9007199254740993);  // 2^53 + 1 is no double
  for (const char* text : {"9223372036854775808", "18446744073709551615", "18446744073709551616", "1.0", "1e3"}) {
    EXPECT_EQ(parse(text).as_integer(), std::nullopt) << text;
    EXPECT_TRUE(parse(text).as_number()) << text;
  }
}

TEST(Json, RefusesWhatIsNotOneValue) {
  const std::string cases[] = {"",
                               " ",
                               "{",
                               "[1,]",
                               "{\"a\":1,}",
                               "01",
                               "+1",
                               ".5",
                               "1.",
                               "NaN",
                               "Infinity",
                               "-Infinity",
                               "1e999",
                               "'a'",
                               "{a:1}",
                               "// c\n1",
                               "/* c */ 1",
                               "{} {}",
                               "{}x",
                               "\"\t\"",
                               "\"\\x\"",
                               "\"\\ud800\"",
                               "tru",
                               "[1 2]",
                               std::string("{}\0", 3),
                               std::string("{}\0{}", 5),
                               std::string("\"\0\"", 3),
                               "\xef\xbb\xbf{}",
                               "\"\xff\"",
                               "\"\xc0\xaf\"",
                               "\"\xed\xa0\x80\"",
                               "\"\xf4\x90\x80\x80\"",
                               "\"\xe2\x82\""};
  for (const std::string& text : cases) {
    const std::string message = test::message_of<FormatError>([&] { parse(text); });
    EXPECT_EQ(message.rfind("file: ", 0), 0u) << message;
    EXPECT_TRUE(is_utf8(message)) << in_quotes(text);
  }
}

TEST(Json, RefusesDuplicateKeysAndNamesThem) {
  EXPECT_THROW_WITH(parse(R"({"a": 1, "a": 1})"), FormatError, "file: found the key \"a\" twice");
  EXPECT_THROW_WITH(parse(R"({"a": [0, {"b": 1, "c": 2, "\u0062": 3}]})"), FormatError,
                    "file: a[1]: found the key \"b\" twice");
  EXPECT_NO_THROW(parse(R"({"a": {"a": 1}, "b": {"a": 1}})"));
}

TEST(Json, LimitsDepth) {
  EXPECT_NO_THROW(parse(nested(100)));
  EXPECT_THROW_WITH(parse(nested(101)), FormatError, "nested deeper than 100");
  EXPECT_THROW(parse(std::string(1 << 20, '[')), FormatError);
}

TEST(JsonObject, NamesThePlaceOfAFailure) {
  const Json json = parse(R"({"size": 1.5, "name": 3, "on": "yes", "list": {}, "x": "1", "big": 9223372036854775808})");
  JsonObject object(json, "file", "layers[3]");
  EXPECT_THROW_WITH(object.integer("size"), FormatError, "file: layers[3].size: found 1.5, expected an integer");
  EXPECT_THROW_WITH(object.integer("big"), FormatError, "found 9223372036854775808, expected an integer");
  EXPECT_THROW_WITH(object.integer_or_null("x"), FormatError, "found \"1\", expected an integer or null");
  EXPECT_THROW_WITH(object.string("name"), FormatError, "layers[3].name: found 3, expected a string");
  EXPECT_THROW_WITH(object.boolean("on"), FormatError, "found \"yes\", expected true or false");
  EXPECT_THROW_WITH(object.array("list"), FormatError, "found an object, expected an array");
  EXPECT_THROW_WITH(object.number("x"), FormatError, "found \"1\", expected a number");
  EXPECT_THROW_WITH(object.number("gone"), FormatError, "layers[3].gone: found no such key, expected a number");
  EXPECT_THROW_WITH(JsonObject(parse("[1, 2]"), "file", "a"), FormatError, "file: a: found an array of 2");
}

TEST(JsonObject, RefusesUnknownKeys) {
  const Json json = parse(R"({"a": 1, "b": 2})");
  JsonObject object(json, "file", "");
  EXPECT_EQ(object.integer("a"), 1);
  EXPECT_EQ(object.find("c"), nullptr);
  EXPECT_THROW_WITH(object.finish(), FormatError, "file: b: found an unknown key, expected only a, c");
  EXPECT_EQ(object.integer("b"), 2);
  EXPECT_NO_THROW(object.finish());
}

TEST(Json, WritesNumbersThatReadBack) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 10000; ++i) {
    const auto bits = random();
    double x;
    std::memcpy(&x, &bits, sizeof x);
    if (!std::isfinite(x)) continue;
    EXPECT_EQ(parse(json_number(x)).as_number(), x);
    EXPECT_EQ(parse(json_number(x)).as_integer(), std::nullopt);
  }
  EXPECT_EQ(json_number(10000), "10000.0");
  EXPECT_EQ(json_number(1e-12), "1e-12");
}

TEST(Json, WritesStringsThatReadBack) {
  for (const std::string& text :
       {std::string("a\"b\\c\n\x01\x7f"), std::string("\0x", 2), std::string("é\xf0\x9f\x98\x80")}) {
    EXPECT_EQ(*parse(json_string(text)).as_string(), text);
  }
  EXPECT_THROW_WITH(json_string("a\xff"), InvalidArgument, "\"a\\xff\"");
}

TEST(Text, PrintableIsUtf8AndShort) {
  EXPECT_EQ(printable("a\nb\xffé"), "a\\x0ab\\xffé");
  EXPECT_EQ(printable(std::string(1000, 'x'), 10), "xxxxxxxxxx...");
  std::mt19937 random(3);
  for (int i = 0; i < 2000; ++i) {
    std::string text(random() % 40, ' ');
    for (char& c : text) c = static_cast<char>(random() % 3 ? random() : 0x80 + random() % 0x40);
    EXPECT_TRUE(is_utf8(printable(text)));
    if (is_utf8(text)) {
      EXPECT_EQ(*parse(json_string(text)).as_string(), text);
    } else {
      EXPECT_THROW(parse('"' + text + '"'), FormatError);
    }
  }
}

TEST(Text, MakesControlCharactersVisible) {
  EXPECT_EQ(printable("a\x1b[31m\x07\x7f"), "a\\x1b[31m\\x07\\x7f");
  EXPECT_EQ(printable("\xc2\x9b"
                      "31m"),
            "\\xc2\\x9b"
            "31m");  // C1: CSI in one character
  EXPECT_EQ(printable("\xe2\x80\xae"
                      "txt"),
            "\\xe2\\x80\\xae"
            "txt");  // right to left
  EXPECT_EQ(printable("\xe2\x81\xa6\xef\xbb\xbf"), "\\xe2\\x81\\xa6\\xef\\xbb\\xbf");
  EXPECT_EQ(printable("é\xc2\xa0中😀…"), "é\xc2\xa0中😀…");
  EXPECT_STREQ(FormatError("a\x1b"
                           "b\nc\xff")
                   .what(),
               "a\\x1b"
               "b\nc\\xff");
  EXPECT_STREQ(InvalidArgument("\x07").what(), "\\x07");
  EXPECT_STREQ(OutOfMemory("\x07").what(), "\\x07");
  EXPECT_NE(std::string(IoError(2, "open \x1b").what()).find("open \\x1b"), std::string::npos);
}

}  // namespace
}  // namespace based::io
