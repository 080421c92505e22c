{# Schemas are named exactly as configured: one database is one deployment, so no prefix is needed to keep two apart. #}
{% macro generate_schema_name(custom_schema_name, node) -%}
    {{ (custom_schema_name or target.schema) | trim }}
{%- endmacro %}
