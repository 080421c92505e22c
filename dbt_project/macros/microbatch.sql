{#
  What a batch does to a microbatch table: the rows of its window and every key it states again are replaced.
  dbt-postgres merges by key, which keeps rows whose events are gone; here running a day again gives that day's
  state, also after an erasure.
#}
{% macro postgres__get_incremental_microbatch_sql(arg_dict) %}
    {%- set target = arg_dict['target_relation'] -%}
    {%- set batch = arg_dict['temp_relation'] -%}
    {%- set unique_key = arg_dict['unique_key'] -%}
    {%- set columns = get_quoted_csv(arg_dict['dest_columns'] | map(attribute='name')) -%}

    delete from {{ target }}
    where {{ in_batch(config.get('event_time')) }};

    delete from {{ target }}
    where {{ unique_key }} in (select {{ unique_key }} from {{ batch }});

    insert into {{ target }} ({{ columns }})
    select {{ columns }} from {{ batch }}
{% endmacro %}


{# A condition that holds for rows whose `column` (timestamptz) is inside the batch being built. #}
{% macro in_batch(column) -%}
    ({{ column }} >= '{{ model.batch.event_time_start }}' and {{ column }} < '{{ model.batch.event_time_end }}')
{%- endmacro %}
