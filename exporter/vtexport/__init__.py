"""vtexport compiles vision-language models into engines that prune visual tokens inside."""
