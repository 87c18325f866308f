// Prints how Tokenizer sees texts, for the comparison with the Python tokenizer: reads JSON texts,
// one a line, and writes for each {"ids": [...], "text": "..."}.

#include <iostream>
#include <nlohmann/json.hpp>

#include "tokenizer.hpp"

// What goes wrong ends this tool of the tests. NOLINTNEXTLINE(bugprone-exception-escape)
int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: hot_edit_tokenize tokenizer.json < texts.jsonl\n";
    return 2;
  }
  using Json = nlohmann::json;
  const hot_edit::Tokenizer tokenizer(argv[1]);
  for (std::string line; std::getline(std::cin, line);) {
    const auto ids = tokenizer.encode(Json::parse(line).get<std::string>());
    const Json seen{{"ids", ids}, {"text", tokenizer.decode(ids)}};
    std::cout << seen.dump(-1, ' ', false, Json::error_handler_t::replace) << "\n";
  }
}
