"""Cases of matrices that `make test-system` runs: each costs as much as those of the same test that stay in `make test`, and
differs from them by what another test has too. Every kind, and every row of docs/faults.md, keeps a quick case in `make test`."""

from __future__ import annotations

import re

import pytest

HEAVY = {
    # function: the cases, as a pattern of the whole text between the brackets
    # data
    "test_a_log_in_order_is_the_dataset_of_the_frame_in_any_form_too": r"(?!csv|semicolons|one user a line-|parquet).*-last|(no header|tsv|csv).*gz.*-time",
    "test_buckets_that_do_not_follow_the_contract_are_refused": r".*(does not follow|does not)[1-5]?",
    "test_fault_G30_a_folder_that_breaks_a_rule_is_refused_by_its_number": r".*-(1|1000)",
    "test_no_byte_depends_on_engine_or_sizes": r"(?!random).*",
    "test_prepared_weights_are_those_of_memory": r"column.*|no validation.*",
    "test_text_is_prepared_as_parquet_is": r"tsv.*|pipes.*|a separator.*|byte.*|no header|semicolons|csv.gz",
    "test_what_is_prepared_on_a_disk_is_what_is_prepared_in_memory": r"(last|gap|user_random|no validation|column without times|time with repeats)-local"
    r"|(time|random|user_ratio|column|random without times|random with repeats|gap with repeats)-duckdb",
    "test_unknown_ids_are_treated_on_a_disk_as_in_memory": r"(add-drop|auto-auto)-local|drop-add-duckdb",
    # features, model, training
    "test_a_config_names_kinds_of_ones_own_by_import_path": r".*",
    "test_a_dataset_holds_the_column_also_after_its_files": r"(categorical|numeric|multi_hot|vector|text|mykinds\..*)-context",
    "test_a_run_is_trained_published_and_asked": r"(numeric|multi_hot|vector|text|mykinds\.features.*)-context|mykinds\.carriers.*-user",
    "test_a_run_stopped_at_any_step_ends_in_the_same_weights": r"3-candidates|6-pairs|[35]",
    "test_a_run_with_memory_and_mined_candidates_stopped_at_any_step_ends_in_the_same_weights": r"causal.*|.*-(2|5|6)",
    "test_every_optimizer_and_precision_lowers_the_loss": r"bf16-(?!Adam$).*",
    "test_ranks_train_what_one_trains": r"2-(pairs|pairs and random ones|mimic of pairs|in batch|memory|own candidates|earlier|weights of candidates|a last batch of one"
    r"|a last batch of one pair|mimic of candidates)",
    "test_the_checkerboard_is_solved_by_every_loss_and_source_of_candidates": r"(uniform|popularity|full)-.*-dot|all-(bpr|gbce)-.*",
    "test_the_checkerboard_is_solved_by_every_tower_similarity_and_sampler": r"0-.*|2-tower[01]-dot",
    "test_the_checkerboard_is_solved_through_every_branch": r".*-bf16",
    "test_the_mean_count_of_an_item_is_the_exponential_of_its_log_q": r"uniform|popularity|popularity\^0|uniform and memory",
    "test_two_ranks_train_with_pieces_what_one_trains_with_whole_tables": r"(?!(attention, by column|earlier, by row|pairs, Adagrad|mimic of candidates, by table)$).*",
    # indexes
    "test_a_saved_index_gives_the_same_and_goes_on": r".*-milvus (IVF|HNSW).*|False-.*-dot",
    "test_allowed_and_banned_rows": r"(0\.5|0\.0)-.*|.*-milvus (IVF|HNSW).*",
    "test_both_methods_give_what_an_exact_index_gives": r"server",
    "test_every_index_answers_a_table_as_it_answers_single_requests": r"milvus-(?!plain).*|.*-(seen|banned|allowed)",
    "test_fault_C10_a_constant_catalogue": r"milvus (IVF|HNSW).*",
    "test_rows_come_change_and_go": r"milvus (IVF|HNSW).*",
    "test_rows_from_0_on_are_found_as_any_others": r"milvus (?!FLAT).*|.*-cosine",
    "test_the_best_k_as_a_loop_finds_them": r"(7|600)-.*|.*-milvus (IVF|HNSW).*",
    "test_tuning_reaches_the_target_with_the_least": r"milvus (IVF|HNSW).*",
    # towers, bundles, stores
    "test_an_exported_tower_gives_the_vectors_of_the_model": r"(?!bias-|all of it|gates).*-(uneven|decay|shared|attention)",
    "test_fault_A7_dims_metric_or_counts_that_differ_are_refused": r"folder-names[13].*|bucket-names[02].*",
    "test_fault_A7_a_service_refuses_files_that_differ_in_its_bucket": r"A7-(dims|counts)",
    "test_fault_G18_a_damaged_file_of_a_bundle_is_a_line_that_names_it_and_never_a_traceback": r"disk-6",
    "test_fault_G18_verbs_say_which_file_is_damaged_in_one_line": r"disk-(?!encoders).*",
    "test_fault_G7_what_is_no_file_of_a_store_keeps_no_verb_waiting": r"HISTORY.*|MANIFEST.*",
    "test_the_weights_of_the_gates_are_those_of_the_model": r"(senet|branch).*-(uneven|attention)",
    # runs, jobs, services
    "test_fault_G1_G2_no_command_loads_a_foreign_tower": r"recommend-(subgraph-item|bomb).*|evaluate-(subgraph|bomb_at_load-user).*",
    "test_fault_C11_a_killed_job_is_gone_on_with_to_the_same_bytes": r"2|shard:0|shard\.files|shard:4|-1",
    "test_fault_G12_a_kill_at_any_point_leaves_the_old_run_or_the_new": r"overwrite",
    "test_fault_G4_more_connections_than_files_silence_nobody": r"128-200-1",
    "test_it_learns_saves_loads_and_tests_to_the_same_auc": r"False",
    "test_the_threads_of_a_verb_are_those_of_polars_and_torch": r"verb1",
}


def mark_heavy(item: pytest.Item) -> None:
    """Mark a test as one of the system if it is such a case."""
    function, _, case = item.name.partition("[")
    cases = HEAVY.get(function)
    if cases is not None and re.fullmatch(cases, case.removesuffix("]")):
        item.add_marker(pytest.mark.system)
