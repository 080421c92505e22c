{#
  Views are replaced in place. The built-in way renames the old view away and drops it with CASCADE, which takes
  along every view built on it: refreshing one staging view alone would break the models downstream.
  Postgres only lets a replaced view gain columns at its end; after any other change the view and what depends on
  it are dropped, and a full `dbt build` brings them back.
#}
{% materialization view, adapter='postgres' %}
    {%- set existing = load_cached_relation(this) -%}
    {%- set target_relation = this.incorporate(type='view') -%}

    {{ run_hooks(pre_hooks, inside_transaction=False) }}
    {{ run_hooks(pre_hooks, inside_transaction=True) }}

    {% if existing is not none and not (existing.is_view and view_can_be_replaced(existing, sql)) %}
        {% do log("Dropping " ~ existing ~ " and what depends on it: its columns changed", info=true) %}
        {% do adapter.drop_relation(existing) %}
    {% endif %}

    {% call statement('main') -%}
        {{ get_replace_view_sql(target_relation, sql) }}
    {%- endcall %}

    {% do apply_grants(target_relation, config.get('grants'), should_revoke=should_revoke(existing, full_refresh_mode=True)) %}
    {% do persist_docs(target_relation, model) %}

    {{ run_hooks(post_hooks, inside_transaction=True) }}
    {{ adapter.commit() }}
    {{ run_hooks(post_hooks, inside_transaction=False) }}

    {{ return({'relations': [target_relation]}) }}
{% endmaterialization %}


{# Whether the columns of `sql` are those of the view `existing`, in the same order, with or without more at the end. #}
{% macro view_can_be_replaced(existing, sql) %}
    {% set wanted = [] %}
    {% for column in adapter.get_column_schema_from_query(sql) %}
        {% do wanted.append(column.name ~ ' ' ~ column.dtype) %}
    {% endfor %}
    {% set present = [] %}
    {% for column in adapter.get_column_schema_from_query('select * from ' ~ existing ~ ' where false') %}
        {% do present.append(column.name ~ ' ' ~ column.dtype) %}
    {% endfor %}
    {{ return(wanted[:present | length] == present) }}
{% endmacro %}
