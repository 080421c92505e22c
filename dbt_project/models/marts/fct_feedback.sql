{{
    config(
        materialized='incremental',
        incremental_strategy='microbatch',
        event_time='effective_at',
        batch_size='day',
        begin=var('start_date'),
        unique_key='event_id',
        on_schema_change='append_new_columns',
        indexes=[
            {'columns': ['event_id'], 'unique': true},
            {'columns': ['feedback_id']},
            {'columns': ['trace_id', 'span_id']},
            {'columns': ['effective_at']}
        ],
        tags=['daily']
    )
}}

select * from {{ ref('int_feedback_redacted') }}
