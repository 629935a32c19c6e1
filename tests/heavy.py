"""Tests, and cases of matrices, that `make test-system` runs: each costs much, and differs from those that stay in `make test` by what
another test has too. Every kind, and every row of docs/faults.md, keeps a quick case in `make test`."""

from __future__ import annotations

import re

import pytest

HEAVY = {
    # function: the cases, as a pattern of the whole text between the brackets
    # whole tests, beside which others of the same row or module are quick
    "test_the_recipe_ranks_cold_items_of_a_made_world_as_well_as_content_alone_and_warm_ones_better": r".*",
    "test_faiss_runs_with_the_settings_that_its_row_states": r".*",
    "test_characters_that_a_terminal_does_not_have_end_nothing": r".*",
    "test_what_is_printed_into_a_file_is_utf_8_in_every_locale": r".*",
    "test_fault_G17_names_that_are_no_utf_8_are_refused_before_anything_is_done": r".*",
    "test_memory_does_not_grow_with_a_bucket": r".*",
    "test_a_sequence_of_categories_finds_what_a_sequence_of_ids_does_not": r".*",
    "test_faiss_gets_its_kernels_when_it_is_loaded_and_nobody_else_does": r".*",
    "test_fault_F1_milvus_down_at_the_start_is_not_ready_and_comes_back": r".*",
    "test_batches_need_no_torch": r".*",
    "test_fault_A4_a_child_that_dies_or_hangs_is_an_error": r".*",
    "test_no_torch_in_the_process": r".*",
    "test_fault_G4_the_soft_limit_of_open_files_is_raised": r".*",
    "test_fault_E3_a_signal_to_the_whole_group_drains_as_one_to_the_first": r".*",
    "test_fault_A10_readers_always_find_a_whole_bundle_while_it_is_replaced_and_collected": r".*",
    "test_fault_A1_kill_at_every_point_of_rollback_and_gc": r".*",
    "test_fault_A4_a_service_refuses_a_hostile_index_in_its_bucket": r".*",
    "test_the_example_of_own_data_trains_and_beats_popularity": r".*",
    "test_a_service_answers_in_the_base": r".*",
    "test_a_run_is_utf_8_whatever_the_locale_says": r".*",
    "test_a_killed_run_goes_on_to_the_same_bits": r".*",
    "test_a_killed_run_of_pieces_is_read_at_its_best_epoch": r".*",
    "test_a_run_of_pieces_goes_on_with_whole_tables_and_with_other_ranks": r".*",
    "test_fault_G4_the_idle_connection_used_least_lately_makes_room": r".*",
    "test_fault_G4_stalled_bodies_are_bounded_together": r".*",
    "test_fault_G4_no_file_left_to_accept_with_is_no_work": r".*",
    "test_fault_G3_line_breaks_after_a_reply_do_not_keep_a_connection": r".*",
    "test_fault_G3_a_client_that_leaves_with_requests_sent_ahead_is_no_error": r".*",
    "test_fault_F1_milvus_killed_in_the_middle_falls_back_and_comes_back": r".*",
    "test_fault_F3_an_alias_that_could_not_be_moved_is_told_and_moved_later": r".*",
    "test_fault_B6_a_rank_that_hangs_ends_the_job_within_the_timeout": r".*",
    "test_fault_G8_a_dataset_whose_place_another_takes_is_not_mixed_with_it": r".*",
    "test_fault_A6_a_service_refuses_a_tower_of_another_model_in_its_bucket": r".*",
    "test_one_process_trains_with_torchrec_what_it_trains_without": r".*",
    "test_threads_that_search_at_once_for_the_first_time_restore_the_number": r".*",
    "test_what_depends_on_the_gaps_of_a_history_is_found_with_them": r".*",
    "test_lost_and_late_answers_are_counted_and_the_rest_goes_on": r".*",
    "test_a_run_can_be_stopped": r".*",
    "test_a_training_reads_its_own_files_whatever_becomes_of_the_prepared_ones": r".*",
    # further cases of the services, runs and losses
    "test_fault_G19_a_model_larger_than_the_machine_is_refused_before_anything_is_written": r"model\.pairs.*",
    "test_a_log_by_day_is_trained_and_prepared_as_a_log_with_a_column_of_days": r"csv",
    "test_each_interaction_reads_what_it_reads_in_memory": r"time",
    "test_a_model_trained_on_a_disk_is_evaluated_published_and_asked": r"sections[12]",
    "test_a_user_that_moves_is_understood_with_versions_alone": r"bce",
    "test_the_leak_of_a_snapshot_is_gone_with_versions": r"bce",
    "test_candidates_of_many_queries_take_memory_that_is_bounded": r"allowed1",
    "test_fault_F3_a_publisher_killed_at_60_percent_leaves_nothing_that_is_served": r"gc",
    "test_a_world_whose_next_item_follows_the_last_but_one_is_learnt_by_a_transformer": r"plain",
    "test_fault_A4_a_hostile_index_is_refused_at_publish_and_the_old_bundle_answers": r"bucket",
    "test_fault_E3_a_signal_while_workers_begin_ends_them_all": r"0\.0|0\.3|0\.6",
    "test_fault_G7_a_store_that_hangs_stops_neither_answers_nor_sigterm": r"CURRENT-True|MANIFEST.*",
    "test_each_shape_has_its_recipe_whose_config_trains": r"sequence-long",
    "test_the_whole_way_through_folders_of_any_name": r"parquet",
    "test_fault_G8_of_three_at_once_one_is_done": r"other",
    "test_the_way_out_of_an_error_trains": r"negatives\.(?!in_batch|cross).*loss\.kind=softmax|train\.monitor=validation\.(gauc|log_loss|mrr.*)|split\.kind=(user_random|time)|schema\.duplicates=keep",
    "test_every_option_changes_the_answers_and_is_refused_in_a_folder_of_another": r"where|unknown|ban",
    "test_the_floor_of_every_loss_is_what_the_best_cosines_give": r"gbce",
    "test_nor_have_other_sound_settings": r"sections[246]",
    "test_a_feature_that_tells_the_label": r"words|bucket",
    "test_a_contrastive_loss_is_that_of_each_positive_among_the_candidates_of_its_time": r"softmax-(full|hard|unmasked)|gbce-shared|bpr-per positive",
    "test_a_contrastive_loss_equals_a_double_loop_in_value_and_gradients": r".*(calibration=0\.[47].*|log_q=False.*)",
    "test_fault_G18_a_manifest_with_another_type_deep_inside_is_refused": r"disk-.*value[1-8]",
    "test_fault_G30_buckets_of_another_schema_are_refused": r"update[345].*",
    "test_every_metric_slice_interval_and_baseline_of_a_disk_is_that_of_memory": r"0-True-(last|time)|9-False-(time|random)|0-False-last",
    "test_tables_of_embed_and_recommend_have_any_form": r"semicolons|tab as.*|no header",
    "test_fault_G17_an_output_that_is_full_or_closed_costs_what_is_said_and_not_the_run": r"open-open-closed2.*|full-full.*",
    "test_every_layout_of_codes_gives_what_rows_alone_give_and_the_same_gradient": r"bag-(sum|power|decay)|padded-(sqrt|ridge|attention)|prefixes-(mean|transformer)|windows-(sum|sqrt)",
    "test_fault_G7_what_is_no_file_of_a_store_changes_nothing_but_a_counter": r"(True|False)-(huge|link)-(HISTORY|MANIFEST).*|False-(fifo|folder)-(HISTORY|MANIFEST).*",
    "test_with_the_correction_the_mean_gradient_is_that_of_the_full_softmax_and_without_it_is_not": r"popularity",
    "test_an_answer_does_not_depend_on_the_rest_of_its_table": r"milvus",
    "test_changing_an_option_of_a_branch_changes_an_output": r"(?!mlp).*-senet-.*",
    "test_changing_an_option_of_a_pooling_changes_an_output": r"transformer-(heads|blocks|feed_forward|input_dropout).*|attention-input_dropout.*|ridge-(penalty|rate).*",
    "test_changing_an_option_of_a_text_changes_an_output": r"other[34568]",
    "test_fault_G1_G2_a_foreign_tower_is_refused_counted_and_the_old_bundle_answers": r"(endless|bomb).*",
    # data
    "test_a_log_in_order_is_the_dataset_of_the_frame_in_any_form_too": r"(?!csv|semicolons|one user a line-|parquet).*-last|(no header|tsv|csv).*gz.*-time",
    "test_buckets_that_do_not_follow_the_contract_are_refused": r".*(does not follow|does not)[1-5]?",
    "test_fault_G30_a_folder_that_breaks_a_rule_is_refused_by_its_number": r".*-(1|1000)",
    "test_no_byte_depends_on_engine_or_sizes": r"(?!random).*",
    "test_prepared_weights_are_those_of_memory": r"column.*|no validation.*",
    "test_fault_C13_a_preparation_goes_on_from_every_point": r"local-.*",
    "test_text_is_prepared_as_parquet_is": r"tsv.*|pipes.*|a separator.*|byte.*|no header|semicolons|csv.gz",
    "test_what_is_prepared_on_a_disk_is_what_is_prepared_in_memory": r"(last|gap|user_random|no validation|column without times|time with repeats)-local"
    r"|(time|random|user_ratio|column|random without times|random with repeats|gap with repeats)-duckdb",
    "test_unknown_ids_are_treated_on_a_disk_as_in_memory": r"(add-drop|auto-auto)-local|drop-add-duckdb",
    # features, model, training
    "test_changing_an_option_changes_an_output": r"(?!train|loss|negatives).*",
    "test_fault_G17_an_answer_that_cannot_be_written_is_not_code_0": r"full-full-",
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
    "test_both_methods_give_what_an_exact_index_gives": r".*",
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
    "test_fault_G18_a_damaged_file_of_a_bundle_is_a_line_that_names_it_and_never_a_traceback": r"disk-12",
    "test_fault_G18_verbs_say_which_file_is_damaged_in_one_line": r"disk-(?!encoders).*",
    "test_fault_G7_what_is_no_file_of_a_store_keeps_no_verb_waiting": r"HISTORY.*|MANIFEST.*",
    "test_the_weights_of_the_gates_are_those_of_the_model": r"(senet|branch).*-(uneven|attention)",
    # runs, jobs, services
    "test_fault_G1_G2_no_command_loads_a_foreign_tower": r"recommend-(subgraph-item|bomb).*|evaluate-(subgraph|bomb_at_load-user).*",
    "test_fault_C11_a_killed_job_is_gone_on_with_to_the_same_bytes": r"2|shard:0|shard\.files|shard:4|-1",
    "test_fault_G12_a_kill_at_any_point_leaves_the_old_run_or_the_new": r"overwrite",
    "test_fault_G4_more_connections_than_files_silence_nobody": r".*",
    "test_it_learns_saves_loads_and_tests_to_the_same_auc": r"False",
    "test_the_threads_of_a_verb_are_those_of_polars_and_torch": r".*",
}


def mark_heavy(item: pytest.Item) -> None:
    """Mark a test as one of the system if it is such a case."""
    function, _, case = item.name.partition("[")
    cases = HEAVY.get(function)
    if cases is not None and re.fullmatch(cases, case.removesuffix("]")):
        item.add_marker(pytest.mark.system)
