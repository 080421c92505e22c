{# When something counts as having happened: a client's clock may run late but is not believed about the future. #}
{% macro effective_time() -%}
    least(occurred_at, received_at)
{%- endmacro %}


{# The UTC day of a timestamptz, whatever the session's time zone. #}
{% macro utc_day(timestamp) -%}
    ({{ timestamp }} at time zone 'UTC')::date
{%- endmacro %}
