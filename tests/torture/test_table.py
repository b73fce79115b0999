"""Bad input and faults: which test shows what a user gets of each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]

# A row is its number and the fault, in brackets what is owed where that may surprise. Below it the
# tests, or after "none:" why there can be none.
TABLE = """
1 a file that is not there
    test_generate.py::test_a_wrong_path_is_told_before_torch_is_loaded
    test_tracks.py::test_a_folder_without_songs_says_what_was_expected
2 a folder instead of a file (generate.py takes its songs)
    test_reading.py::test_paths_that_are_no_sound_files_are_named
3 a file that one may not read
    test_reading.py::test_a_forbidden_file_is_told_as_such
4 an empty file
    test_reading.py::test_paths_that_are_no_sound_files_are_named
5 text called .wav; a wrong extension
    test_reading.py::test_paths_that_are_no_sound_files_are_named
    test_reading.py::test_every_container_is_read_whole
6 a header and no samples
    torture/test_faults.py::test_what_cannot_be_separated_is_one_line_each_and_leaves_nothing
7 a file that is cut
    test_generate.py::test_a_folder_keeps_its_tree_and_a_bad_file_does_not_stop_it
    test_reading.py::test_a_cut_file_is_an_error_never_a_shorter_success
8 the length that a pipe writes
    test_reading.py::test_the_length_that_a_pipe_writes_is_accepted_with_a_warning
9 a header that promises too little
    torture/test_faults.py::test_bytes_behind_the_length_that_a_header_promises_are_told
10 samples that are no numbers (no option zeroes them: repair the file)
    test_generate.py::test_a_song_that_breaks_off_leaves_nothing_new_and_does_not_stop_others
    test_reading.py::test_float_samples_that_are_none_or_would_overflow_are_refused
11 silence
    torture/test_faults.py::test_odd_sounds_are_separated_and_add_up
12 direct current, denormal and hardly audible sounds
    torture/test_faults.py::test_odd_sounds_are_separated_and_add_up
13 32 dB above full scale; 1e38 (refused: it would overflow)
    torture/test_faults.py::test_odd_sounds_are_separated_and_add_up
    torture/test_faults.py::test_what_cannot_be_separated_is_one_line_each_and_leaves_nothing
14 one sample, two, a window, a hop
    test_separation.py::test_a_song_of_any_length_keeps_its_length
15 shorter than the network's view
    torture/test_faults.py::test_odd_sounds_are_separated_and_add_up
16 hours
    test_generate.py::test_a_long_song_takes_no_more_memory_than_a_short_one
17 a WAV of more than 4 GiB
    test_writing.py::test_beyond_4_gib_the_header_has_64_bits
18 1, 2, 6, 32 and 1025 channels
    test_generate.py::test_vocals_and_accompaniment_are_as_the_song_and_add_up
    torture/test_faults.py::test_odd_sounds_are_separated_and_add_up
    torture/test_faults.py::test_what_cannot_be_separated_is_one_line_each_and_leaves_nothing
19 sample rates
    test_separation.py::test_blocks_give_what_the_whole_song_gives_at_once
    test_separation.py::test_what_is_no_waveform_is_refused
20 8 to 64 bits, floats, A-law, mu-law and ADPCM
    test_writing.py::test_what_is_written_is_what_is_read_for_every_format
    test_reading.py::test_every_container_is_read_whole
21 RIFX, RF64, W64, CAF, AIFF, strange chunks
    test_reading.py::test_every_container_is_read_whole
    torture/test_fuzz.py::test_damage_is_told_or_all_of_the_sound_comes_out
22 mp3, flac, ogg and opus
    test_reading.py::test_every_container_is_read_whole
23 the same, damaged or cut
    test_reading.py::test_damage_inside_is_an_error_never_a_shorter_sound
    test_containers.py::test_what_is_not_all_there_is_refused
24 m4a and .stem.mp4, with and without PyAV
    test_decoding.py::test_an_m4a_has_the_length_of_its_original_and_is_in_step
    test_decoding.py::test_garbage_and_playlists_never_reach_the_decoder
25 an mp3 with 20 MB of pictures, or without a Xing header
    test_containers.py::test_all_of_the_sound_comes_whatever_the_header_says
26 names (one too long is refused: shortened, it would be another song's)
    test_generate.py::test_a_name_keeps_all_but_its_extension
    torture/test_faults.py::test_what_cannot_be_separated_is_one_line_each_and_leaves_nothing
27 a terminal that knows ASCII alone
    test_cli.py::test_a_name_in_another_alphabet_is_printed_everywhere
28 what is no regular file
    test_reading.py::test_paths_that_are_no_sound_files_are_named
29 an output that is the input
    test_generate.py::test_a_song_is_never_overwritten
30 a file that is cut while it is read
    torture/test_faults.py::test_a_file_that_is_cut_while_it_is_read_is_an_error
31 an output folder that cannot be
    test_generate.py::test_an_impossible_output_folder_is_told_before_any_work
    test_reading.py::test_a_forbidden_file_is_told_as_such
32 a full disk
    test_writing.py::test_a_disk_that_fills_up_is_one_line_and_keeps_the_old_file
33 a disk with room for one of two stems
    torture/test_faults.py::test_a_full_disk_leaves_both_stems_as_they_were
34 minutes of ogg
    torture/test_faults.py::test_minutes_of_ogg_are_written_at_once
35 a rate that MP3 does not know
    test_writing.py::test_the_format_keeps_what_the_container_can_and_tells_what_it_cannot
36 closed streams, a reader that leaves, no terminal
    test_cli.py::test_a_closed_stream_takes_nothing_away_from_the_others
    test_cli.py::test_a_reader_that_has_seen_enough_is_no_error
37 a pipe that is closed, or ends within a sample
    test_pipes.py::test_what_is_no_wav_is_refused
    test_generate.py::test_a_pipe_that_is_no_sound_is_told_in_one_line
38 no home to write to
    torture/test_faults.py::test_neither_threads_nor_a_missing_home_change_the_stems
39 1 or 64 threads
    torture/test_faults.py::test_neither_threads_nor_a_missing_home_change_the_stems
40 no songs
    test_tracks.py::test_a_folder_without_songs_says_what_was_expected
41 layouts, and two at once
    test_tracks.py::test_data_sets_of_song_folders_are_recognised
    test_tracks.py::test_a_folder_without_songs_says_what_was_expected
42 stems that are missing or there twice
    test_tracks.py::test_every_bad_song_is_named_and_the_others_are_kept
43 a mixture and vocals that differ
    test_tracks.py::test_what_does_not_belong_together_is_trimmed_with_a_note_or_refused
44 silent vocals, loud ones, vocals that are the mixture (refused)
    test_build_dataset.py::test_pairs_that_belong_together_pass
    test_build_dataset.py::test_pairs_that_do_not_are_told_in_numbers
45 two songs of one name
    test_tracks.py::test_two_spellings_of_a_name_are_one_song_and_two_songs_of_one_name_are_bad
46 .DS_Store and the like
    test_tracks.py::test_only_what_is_known_to_be_no_music_is_ignored
47 links in a circle, or to nothing
    test_tracks.py::test_links_that_lead_back_are_not_followed_and_dangling_ones_are_told
48 one bad song of many
    test_build_dataset.py::test_every_bad_song_is_named_and_the_others_are_kept_for_the_next_run
49 kill -9 while a dataset is built
    torture/test_faults.py::test_whenever_a_script_is_killed_nothing_is_lost_and_a_rerun_finishes
50 two builds of one dataset
    test_build_dataset.py::test_what_is_in_the_output_already_is_not_replaced_by_mistake
    test_cli.py::test_a_folder_is_locked_until_its_process_ends
51 another dataset in the output
    test_build_dataset.py::test_other_hparams_are_refused_with_both_values_and_overwrite_replaces
    test_build_dataset.py::test_what_is_in_the_output_already_is_not_replaced_by_mistake
52 a worker that dies
    test_build_dataset.py::test_a_worker_that_dies_ends_the_build_and_is_told_with_its_song
53 one song, and none to validate on
    test_dataset.py::test_songs_that_do_not_suffice_are_refused
54 a song shorter than a window
    torture/test_faults.py::test_short_songs_and_batches_of_any_size_are_learnt_from
55 a disk too small for the dataset (no forecast: what is built is kept)
    torture/test_faults.py::test_a_full_disk_keeps_the_songs_that_are_built
56 a dataset that is missing, unfinished, cut or changed
    test_train.py::test_data_that_cannot_be_used_is_named
    test_dataset.py::test_an_array_that_is_not_what_was_promised_is_named
    test_build_dataset.py::test_only_what_is_not_as_it_was_is_built_again
57 a dataset of other settings
    test_train.py::test_data_that_cannot_be_used_is_named
58 a last batch of one
    torture/test_faults.py::test_short_songs_and_batches_of_any_size_are_learnt_from
59 a loss that is no number
    test_run.py::test_a_number_that_is_none_stops_the_run_and_the_last_save_stays
    test_train.py::test_what_is_no_number_ends_the_run_with_one_line_and_is_not_saved
60 kill -9 while a network is trained
    torture/test_faults.py::test_whenever_a_script_is_killed_nothing_is_lost_and_a_rerun_finishes
61 Ctrl-C once, and twice
    test_train.py::test_a_signal_ends_the_run_after_the_step_and_it_goes_on_as_if_nothing_was
    test_cli.py::test_signals_within_a_second_are_one_request_and_a_later_one_ends
62 a run that goes on
    test_run.py::test_resuming_equals_not_stopping
    test_train.py::test_every_difference_is_named_and_how_to_go_on
63 from a GPU to the CPU and back
    test_cuda.py::test_a_run_goes_on_on_the_other_device
64 a checkpoint that runs code
    test_model.py::test_a_checkpoint_runs_no_code
65 what is no checkpoint
    test_model.py::test_what_is_no_checkpoint_is_refused
66 bits that flipped, weights that are no numbers, or halves
    test_generate.py::test_a_damaged_checkpoint_is_told_and_nothing_is_written
    test_model.py::test_weights_that_are_no_network_are_refused
67 a checkpoint of another network
    test_model.py::test_weights_that_are_no_network_are_refused
    test_generate.py::test_only_settings_that_contradict_the_checkpoint_are_refused
68 a disk that is full when a run is saved
    test_train.py::test_a_disk_that_stays_full_ends_the_run_when_it_ends
    torture/test_faults.py::test_training_outlives_a_full_disk_and_saves_when_there_is_room
69 a log that cannot be written
    test_run.py::test_a_log_that_cannot_be_written_is_one_warning_and_training_goes_on
70 a loader's process that dies
    none: a thread of the run's own process reads
71 too little memory, no GPU
    test_cli.py::test_every_end_has_its_message_and_its_exit_code
    test_train.py::test_wrong_usage_is_told
    torture/test_faults.py::test_a_gpu_that_is_too_small_names_the_setting
72 several GPUs, one of which dies
    test_ranks.py::test_a_rank_that_is_killed_ends_all_within_seconds
    test_ranks.py::test_only_the_first_rank_writes_and_what_it_wrote_scores_the_same_alone
73 no workers, and batches larger than the dataset
    torture/test_faults.py::test_short_songs_and_batches_of_any_size_are_learnt_from
74 options that make no sense
    test_train.py::test_wrong_usage_is_told
    test_hparams.py::test_a_wrong_setting_on_the_command_line_is_told_in_one_line
75 bad checkpoints in generate.py
    test_generate.py::test_a_damaged_checkpoint_is_told_and_nothing_is_written
76 blocks of any size
    test_separation.py::test_blocks_give_what_the_whole_song_gives_at_once
77 the sum of the stems
    test_separation.py::test_integer_files_add_up_sample_by_sample
78 one bad song of many, in generate.py
    test_generate.py::test_a_folder_keeps_its_tree_and_a_bad_file_does_not_stop_it
79 scores of silence
    test_scoring.py::test_silence_neither_crashes_nor_becomes_infinite
80 a checkpoint that grows when it is unpacked
    torture/test_faults.py::test_a_checkpoint_that_would_grow_is_not_unpacked
"""


def test_every_fault_has_a_test_or_a_reason():
    rows = re.split(r"^(\d+) .*\n", TABLE.strip() + "\n", flags=re.MULTILINE)[1:]
    assert rows[::2] == [str(number) for number in range(1, 80 + 1)]
    known = {
        f"{path.relative_to(TESTS).as_posix()}::{node.name}"
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    entries = [row.split("\n") for row in rows[1::2]]
    named = [line.strip() for lines in entries for line in lines if line.strip()]
    assert all(lines[0].strip() for lines in entries), "a row without a test"
    reasons = [name for name in named if name.startswith("none: ")]
    assert sorted(set(named) - set(reasons) - known) == []
    assert len(reasons) <= 1
